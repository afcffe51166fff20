# loss of OpenAI's gpt2 (124M, 12 layers, 12 heads, 768 wide) on OpenWebText;
# what a rank costs: add --use_svd=True --svd_rank=16 --svd_scope=weight
batch_size = 8
eval_only = True
init_from = 'gpt2'
