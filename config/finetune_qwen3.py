# Finetune Qwen3-0.6B on a text of your own with LoRA. --init_from names another model, which must have the dataset's tokenizer:
# nanogpt prepare my.txt --dataset=my-qwen3 --tokenizer=hf:Qwen/Qwen3-0.6B-Base

init_from = "hf:Qwen/Qwen3-0.6B-Base"  # not the chat model: it continues texts
out_dir = "out-qwen3"
dataset = "my-qwen3"
eval_interval = 10
eval_iters = 10
log_interval = 1
always_save_checkpoint = False  # keep only improvements

lora_rank = 8
lora_alpha = 16  # twice the rank, as is usual
lora_base = "bfloat16"  # as the weights are published, so nothing is lost
checkpoint_activations = True  # with both, training took 5.4 GB of memory; see docs/finetuning.md

# 1 sequence x 16 micro-batches x 512 tokens = 8,192 tokens per iteration
block_size = 512
batch_size = 1
gradient_accumulation_steps = 16
max_iters = 100
patience = 3

learning_rate = 2e-4  # as in the paper (Hu et al. 2021, appendix D); far higher than for all weights
lr_schedule = "linear"
warmup_iters = 5
lr_decay_iters = 100
min_lr = 0.0
grad_clip = 1.0
weight_decay = 0.0
