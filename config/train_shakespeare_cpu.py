# train_shakespeare_char.py for a laptop without a GPU: a smaller model and context, about a minute on two cores.

out_dir = "out-shakespeare-char"
eval_interval = 250
eval_iters = 20  # a rough estimate; the loss at the end is exact
log_interval = 10

dataset = "shakespeare_char"
gradient_accumulation_steps = 1
batch_size = 12
block_size = 64

n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.0  # the model is too small to overfit in this time

learning_rate = 1e-3
max_iters = 2000
lr_decay_iters = max_iters
min_lr = learning_rate / 10
beta2 = 0.99
warmup_iters = 100

device = "cpu"
compile = False
