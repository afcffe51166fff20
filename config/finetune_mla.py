# train a checkpoint that compress.py converted, for a tenth of the main config's steps; all other
# settings come from the checkpoint:
# python train.py config/finetune_mla.py --out_dir=out-baseline-test-mla

init_from = 'resume'
eval_interval = 60

learning_rate = 1e-3            # Muon; 5e-3 ended 0.03 nats higher
min_lr = 1e-4
max_iters = 120
warmup_iters = 6                # 5% of the run
