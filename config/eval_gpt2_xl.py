# loss of OpenAI's gpt2-xl (1558M, 48 layers, 25 heads, 1600 wide) on OpenWebText;
# what a rank costs: add --use_svd=True --svd_rank=16 --svd_scope=weight
batch_size = 8
eval_only = True
init_from = 'gpt2-xl'
