# loss of OpenAI's gpt2 (124M parameters, 12 layers, 12 heads, width 768) on OpenWebText;
# for the loss at rank 16 add --use_svd=True --svd_rank=16 --svd_scope=weight

batch_size = 8
eval_only = True
init_from = 'gpt2'
