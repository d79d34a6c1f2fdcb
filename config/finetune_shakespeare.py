# Finetune OpenAI's GPT-2 XL on Shakespeare. --init_from=gpt2 takes less memory.

init_from = "gpt2-xl"  # the largest; also gpt2, gpt2-medium, gpt2-large
out_dir = "out-shakespeare"
eval_interval = 5
eval_iters = 40
log_interval = 1

wandb_log = False
wandb_project = "shakespeare"
wandb_run_name = "ft-gpt2-xl"

dataset = "shakespeare"
always_save_checkpoint = False  # keep only improvements

# 1 sequence x 32 micro-batches x 1024 tokens = 32,768 tokens per iteration;
# the training text has 301,966, so 20 iterations are about two epochs
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

learning_rate = 3e-5  # constant, near the end of pretraining's schedule
decay_lr = False
