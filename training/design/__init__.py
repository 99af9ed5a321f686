"""Train the embedded model to work under `design` visibility: a field is read by its readers only, a skill by nobody's help.

Run it as `python -m training.design --out FOLDER`; `python -m training.design --help` lists the options. In reading order:

    parts.py      a sequence of tokens, each with a part, a position and the index from which it is dead
    masks.py      who reads whom, one token at a time (the reference) and for a whole batch
    lines.py      which part of a system message each of its characters belongs to: plain text, field or reader
    dialogues.py  policies with edits between turns: under design, with errata, or rewritten
    blocks.py     texts compiled alone or in one piece: rule sets, facts, updates
    tools.py      catalogues of invented tools, and requests for one of them
    recipe.py     the mixture, the rates and the schedule
    mixture.py    the sequences of a step, drawn from (seed, step, index)
    batches.py    sequences padded into batches, and the losses on them
    replay.py     windows of plain text, and how likely held-out text is beside the base
    scores.py     held-out answers, in every arm
    loop.py       the run: resumed, timed, checkpointed, exported
"""
