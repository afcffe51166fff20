# loss of OpenAI's gpt2-large (774M parameters, 36 layers, 20 heads, width 1280) on OpenWebText;
# for the loss at rank 16 add --use_svd=True --svd_rank=16 --svd_scope=weight

batch_size = 8
eval_only = True
init_from = 'gpt2-large'
