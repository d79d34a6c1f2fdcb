# A model of GPT-2's size with the modern architecture and Muon, for 8 GPUs with at least 40 GB:
# torchrun --standalone --nproc_per_node=8 train.py config/fast_gpt2.py
# Based on published results (Jordan et al. 2024 need about a third of AdamW's tokens). We have not run it to its end.

out_dir = "out-fast-gpt2"
wandb_run_name = "fast-gpt2-124M"

# 12 sequences x 1024 tokens x 40 micro-batches over all GPUs: 0.5 million tokens per iteration
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8

architecture = "qwen3"

optimizer = "muon"
muon_lr = 0.02
learning_rate = 3e-3  # of AdamW, for the embedding
weight_decay = 0.1

max_iters = 10000  # 5 billion tokens
lr_schedule = "linear"
warmup_iters = 250
lr_decay_iters = max_iters
min_lr = 0.0

eval_interval = 500
eval_iters = 200
log_interval = 10
