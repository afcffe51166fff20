# fine-tune the weights of a run with LoRA adapters; the run itself is not changed:
# python train.py config/finetune_lora.py --init_from=out-baseline-test --dataset=my.txt

out_dir = 'out-lora'
init_from = 'gpt2'              # or a run folder, or a folder from Hugging Face or export.py
eval_interval = 50
eval_iters = 20
log_interval = 10

dataset = 'shakespeare'
gradient_accumulation_steps = 1
batch_size = 4

lora_rank = 8
lora_alpha = 16                 # scales B A by alpha / rank = 2, as in the paper's code
lora_targets = 'c_q,c_v'        # as in the paper
lora_init = 'lora'              # 'pissa', 'milora': start from singular components of the weights

learning_rate = 1e-3            # adapters need 3 to 10 times the rate of full training
min_lr = 1e-4
weight_decay = 0.0
max_iters = 200
warmup_iters = 10               # 5% of the run
