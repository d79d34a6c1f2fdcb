# The fast way to what train_shakespeare_cpu.py reaches: two blocks of the modern architecture, and Muon.
# 5 seconds on two cores, from the start of the process to its end, for a validation loss of 1.88; the classic recipe
# takes a minute for 1.90. benchmarks/time_to_loss.py compares them on your machine, docs/speed.md says why.

out_dir = "out-shakespeare-char"
eval_interval = 40  # often enough that the picture of the losses shows curves
eval_iters = 5  # a rough estimate, or evaluating would take much of so short a time; the loss at the end is exact
log_interval = 20

dataset = "shakespeare_char"
gradient_accumulation_steps = 1
batch_size = 24
block_size = 64

architecture = "qwen3"
n_layer = 2  # in so short a time, many steps of a small model learn more than few of a large one
n_head = 2
n_embd = 64

optimizer = "muon"
muon_lr = 0.05
muon_momentum = 0.7  # what is older than a few steps misleads while the model changes so fast
learning_rate = 0.03  # AdamW's, of the embedding
weight_decay = 0.0
grad_clip = 0.0  # Muon's steps have one length whatever the gradient's

max_iters = 220
lr_schedule = "linear"
warmup_iters = 0
lr_decay_iters = max_iters
min_lr = 0.0

device = "cpu"
