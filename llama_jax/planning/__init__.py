"""What a run or a sampler will need of an accelerator, known before there is one."""
