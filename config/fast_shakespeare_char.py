# The fast way to what train_shakespeare_char.py takes minutes of a GPU for, a validation loss of 1.47: this ends at 1.44.
# Six minutes on two CPU cores that multiply in bfloat16 (AMX), twice that on others. On GPUs it was not measured yet.

out_dir = "out-shakespeare-char"
eval_interval = 100
eval_iters = 8  # a rough estimate; the loss at the end is exact
log_interval = 25
always_save_checkpoint = False

dataset = "shakespeare_char"
gradient_accumulation_steps = 1
batch_size = 16
block_size = 256

architecture = "qwen3"
n_layer = 4
n_head = 4
n_embd = 256
dropout = 0.1  # each character is seen four times

optimizer = "muon"
muon_lr = 0.03
muon_momentum = 0.9
learning_rate = 5e-3  # AdamW's, of the embedding
grad_clip = 0.0

max_iters = 1000
lr_schedule = "linear"
cooldown_frac = 0.8
warmup_iters = 20
lr_decay_iters = max_iters
min_lr = 0.0

dtype = "bfloat16"  # of the products; a CPU without units for it takes float32, and says so
