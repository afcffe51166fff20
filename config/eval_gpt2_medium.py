# loss of OpenAI's gpt2-medium (350M parameters, 24 layers, 16 heads, width 1024) on OpenWebText;
# for the loss at rank 16 add --use_svd=True --svd_rank=16 --svd_scope=weight

batch_size = 8
eval_only = True
init_from = 'gpt2-medium'
