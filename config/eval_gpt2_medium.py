# loss of OpenAI's gpt2-medium (350M, 24 layers, 16 heads, 1024 wide) on OpenWebText;
# what a rank costs: add --use_svd=True --svd_rank=16 --svd_scope=weight
batch_size = 8
eval_only = True
init_from = 'gpt2-medium'
