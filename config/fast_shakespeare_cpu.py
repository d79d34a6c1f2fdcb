# The fast recipe for the result of train_shakespeare_cpu.py: two blocks of the modern architecture, and Muon.
# The whole process takes 5 seconds on two cores and reaches a validation loss of 1.88; the classic recipe takes a minute
# for 1.90. benchmarks/time_to_loss.py compares them on your machine; docs/speed.md explains the difference.

out_dir = "out-shakespeare-char"
eval_interval = 40  # often enough for loss curves
eval_iters = 5  # a rough estimate, since the run is short; the loss at the end is exact
log_interval = 20

dataset = "shakespeare_char"
gradient_accumulation_steps = 1
batch_size = 24
block_size = 64

architecture = "qwen3"
n_layer = 2  # in a short run, many steps of a small model learn more than few of a large one
n_head = 2
n_embd = 64

optimizer = "muon"
muon_lr = 0.05
muon_momentum = 0.7  # the model changes so fast that older gradients mislead
learning_rate = 0.03  # of AdamW, for the embedding
weight_decay = 0.0
grad_clip = 0.0  # the length of Muon's steps does not depend on the gradient's

max_iters = 220
lr_schedule = "linear"
warmup_iters = 0
lr_decay_iters = max_iters
min_lr = 0.0

device = "cpu"
