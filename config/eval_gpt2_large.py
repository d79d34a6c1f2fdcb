# The loss of OpenAI's gpt2-large (774M parameters) on OpenWebText.

init_from = "gpt2-large"
eval_only = True
eval_iters = 500  # more than the default, for a precise estimate
batch_size = 8
wandb_log = False
