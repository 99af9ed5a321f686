"""Train the embedded model for `design` visibility: only its readers read a field, and a skill reads only itself.

Run it as `python -m training.design --out FOLDER`; `python -m training.design --help` lists the options.
In reading order:

    parts.py      a sequence of tokens, each with a part, a position and the index from which it is dead
    masks.py      which tokens read which: for one pair (the reference) and for a whole batch
    lines.py      splits a system message into plain text, fields and readers
    dialogues.py  policies with edits between turns: under design, with errata, or rewritten
    blocks.py     texts compiled alone or in one piece: rule sets, facts, updates
    tools.py      catalogues of tools, invented or written by hand (catalogues.py), and requests for one of them
    words.py      the words of the tokenizer's vocabulary, of which names are made
    recipe.py     the mixture, the rates and the schedule
    mixture.py    the sequences of a step, drawn from (seed, step, index)
    batches.py    sequences padded into batches, and the losses on them
    replay.py     windows of plain text, and the perplexity of held-out text relative to the base
    scores.py     held-out answers, in every arm
    loop.py       the run: resumes, measures time, writes checkpoints, exports
"""
