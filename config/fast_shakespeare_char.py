"""draft"""

out_dir = "out-fast-shakespeare-char"
eval_interval = 250
eval_iters = 20
log_interval = 50
always_save_checkpoint = False

dataset = "shakespeare_char"
gradient_accumulation_steps = 1
batch_size = 16
block_size = 256

architecture = "qwen3"
n_layer = 4
n_head = 4
n_embd = 256

optimizer = "muon"
learning_rate = 5e-3
min_lr = 0.0
muon_lr = 0.02
muon_momentum = 0.9
weight_decay = 0.1
grad_clip = 0.0
lr_schedule = "linear"
cooldown_frac = 0.8
warmup_iters = 20
max_iters = 1700
lr_decay_iters = max_iters

dtype = "bfloat16"
