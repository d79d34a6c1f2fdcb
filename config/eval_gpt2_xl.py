# The loss of OpenAI's gpt2-xl (1558M parameters) on OpenWebText.

init_from = "gpt2-xl"
eval_only = True
eval_iters = 500  # more than the default, for a precise estimate
batch_size = 8
wandb_log = False
