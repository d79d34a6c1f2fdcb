"""draft"""

out_dir = "out-fast-shakespeare"
eval_interval = 1000
eval_iters = 4
log_interval = 20
always_save_checkpoint = False

dataset = "shakespeare_char"
gradient_accumulation_steps = 1
batch_size = 24
block_size = 64

architecture = "qwen3"
n_layer = 2
n_head = 3
n_embd = 96

optimizer = "muon"
learning_rate = 1e-2
min_lr = 0.0
muon_lr = 0.04
muon_momentum = 0.75
weight_decay = 0.0
grad_clip = 0.0
lr_schedule = "linear"
cooldown_frac = 0.6
warmup_iters = 0
max_iters = 170
lr_decay_iters = max_iters

device = "cpu"
dtype = "bfloat16"
