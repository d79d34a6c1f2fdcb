# A character-level GPT on the works of Shakespeare: small, and good for debugging and for learning.
# It takes minutes on one GPU. On a laptop without one, start with config/train_shakespeare_cpu.py.

out_dir = "out-shakespeare-char"
eval_interval = 250  # often, because this model overfits
eval_iters = 200
log_interval = 10

always_save_checkpoint = False  # it overfits, so keep only improvements

wandb_log = False  # or True on the command line
wandb_project = "shakespeare-char"
wandb_run_name = "mini-gpt"

dataset = "shakespeare_char"
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256  # characters of context

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

learning_rate = 1e-3  # small networks tolerate higher rates than large ones
max_iters = 5000
lr_decay_iters = max_iters
min_lr = learning_rate / 10
beta2 = 0.99  # higher than usual, because an iteration has few tokens

warmup_iters = 100
