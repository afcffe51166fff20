# loss of OpenAI's gpt2-xl (1558M parameters, 48 layers, 25 heads, width 1600) on OpenWebText;
# for the loss at rank 16 add --use_svd=True --svd_rank=16 --svd_scope=weight

batch_size = 8
eval_only = True
init_from = 'gpt2-xl'
