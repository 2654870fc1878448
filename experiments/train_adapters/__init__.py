"""Training of all-MiniLM-L6-v2 by RaSA, LoRA and full fine-tuning: learning, speed and forgetting.

    python -m experiments.train_adapters --float32 --rank 2                       the full protocol
    python -m experiments.train_adapters --float32 --rank 2 --only 'rasa(2,1)' 'lora(2)' --at-rate 1e-3
    python -m experiments.train_adapters --float32 --rank 8 --rates 3e-4 1e-3 3e-3
    python -m experiments.train_adapters --device cpu --rank 2 --data-starts --rates 3e-4 1e-3 3e-3 \\
        --out figures/train_adapters_cpu.jsonl                                    starts from data
    python -m experiments.train_adapters --device cpu --rank 8 --only 'rasa(8,1)' 'lora(8)' --at-rate 1e-3 \\
        --out figures/train_adapters_cpu.jsonl
    python -m experiments.train_adapters --device cpu --rank 8 --only 'rasa(8,1)' 'lora(8)' --tuning-seeds 2 \\
        --rates 5e-4 1e-3 2e-3 4e-3 8e-3 --out figures/train_adapters_cpu.jsonl
    python -m experiments.train_adapters --device cpu --rank 8 --only 'rasa(8,1)' --at-rate 2e-3 \\
        --out figures/train_adapters_cpu.jsonl
    python -m experiments.train_adapters --float32 --task prose --rank 8 --only 'lora(8)' --rates 3e-4 1e-3 3e-3 \\
        --keep experiments/trained --out figures/train_adapters_prose.jsonl       adapters of a second task
    python -m experiments.train_adapters --smoke                      three steps of each method, for function only

Runs on a GPU and on CPUs draw other dropout masks, so that all runs of one file must be from one kind of machine:
`train_adapters.jsonl` is from a GPU in float32, `train_adapters_cpu.jsonl` from CPUs with bfloat16 in training.

The task is the one of the bundled updates (`experiments.finetune`): to find Python functions by their
docstrings, InfoNCE over a batch. Training, validation and test pairs come from disjoint modules. The methods are full
fine-tuning, LoRA of rank r, RaSA (r, k), and LoRA of rank q + R, the largest rank of RaSA's updates. All linear layers
of the encoder are adapted; adapters are `rasa_theory.peft`, LoRA is its k = 0. Each method first takes one run, or
several, at every learning rate of one grid; the rate with the best validation MRR is used for the seeds. Runs of one
seed see the same batches and the same dropout masks. Every finished run is a line of --out, and is not run again.

Forgetting is measured on prose from Python's language reference and from the descriptions and licences of installed
packages: the model has to find, for a sentence, the one that follows it. Drift is one minus the mean cosine between the
embeddings of these sentences before and after training.
"""

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: one process per processor, see --jobs
