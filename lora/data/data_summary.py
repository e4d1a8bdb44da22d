"""A data set in one line: sequences, tokens, targets, lengths, and what was left out."""


def describe_data(name: str, facts: dict) -> str:
    """Return a line about a part of the data. `facts` is what `tokenise_examples` returns."""
    counts = f"{facts['examples']} examples in {facts['rows']} sequences"
    median, most, longest = facts["lengths"]
    parts = [
        f"{name}: {counts}, {facts['tokens']} tokens, {facts['targets']} targets",
        f"lengths: median {median}, 95th percentile {most}, maximum {longest}",
    ]
    if "label_mean" in facts:
        zeros, ones = facts["label_shares"]
        shares = f"{zeros:.1%} are 0, {ones:.1%} are 1"
        parts.append(f"labels: mean {facts['label_mean']:.3f}, {shares}")
    fates = {"cut": "cut off at max_length", "without_target": "left out, without a target"}
    for key, fate in fates.items():
        if facts[key]:
            share = f"{facts[key] / facts['examples']:.1%}"
            parts.append(f"{facts[key]} examples ({share}) {fate}")
    if facts["unprinted_reasoning"]:
        count = facts["unprinted_reasoning"]
        parts.append(
            f"reasoning of {count} messages left out, which the chat template does not print"
        )
    if facts.get("labels_left_out"):
        left_out = facts["labels_left_out"]
        parts.append(f"{left_out} labelled steps left out, because they do not fit max_length")
    return "; ".join(parts)
