"""Compression of several trained LoRAs together, and the error that is left in their updates.

    python -m experiments.compression                            experiments/trained/*
    python -m experiments.compression --adapters DIR DIR ..      folders of PEFT LoRA adapters of one base
    python -m experiments.compression --figure                   the picture alone, from the data

Folders whose names differ in a number at the end alone (`lora-2-seed-0`, `lora-2-seed-1`) are a set, seeds of one task;
all sets of one rank are one more. Each set has a stack over adapters and layers for every kind of module, and one over
the adapters alone for every module. Each method of `rasa_theory.methods` is taken at its best within a share of the
LoRAs' own parameters, L r (a + b): at 100 % the LoRAs are stored as they are, without error. Beside these methods stand
shared bases for the factors A_i and B_i as they were trained (SHARE), which users pick today: by `fit_share_basis`, and
by the packages lorashare and vlora-dev where they are installed. All are judged by the product of the factors:

    error = sum_i ||M_i - X_i||^2 / sum_i ||M_i||^2,  M_i = scaling B_i A_i,  X_i its approximation by the method.

The control for chance are `random` LoRAs of the same singular values, `rt.null_models.random_loras`: no two layers have
anything in common. `floor` is the certified floor of joint bases, `Fit.floor`.

Written to --out:

    compression.csv   one row per set, kind, layer, source, draw, share and method, as each is done; an interrupted run
                      goes on from there
    compression.png   error against the share of the parameters, all kinds together
"""
