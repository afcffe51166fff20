# loss of OpenAI's gpt2-large (774M, 36 layers, 20 heads, 1280 wide) on OpenWebText;
# what a rank costs: add --use_svd=True --svd_rank=16 --svd_scope=weight
batch_size = 8
eval_only = True
init_from = 'gpt2-large'
