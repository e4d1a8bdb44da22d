"""A data set in one line: rows, tokens, targets, lengths, and what was left out."""


def describe_data(name, facts):
    """The facts about a part of the data, in a line."""
    median, most, longest = facts["lengths"]
    line = f"{name}: {{examples}} examples in {{rows}} rows, {{tokens}} tokens, {{targets}} targets".format_map(
        facts
    )
    line += f"; lengths: half up to {median}, 95 % up to {most}, all up to {longest}"
    if "label_mean" in facts:
        line += "; label mean {:.3f} ({:.1%} are 0, {:.1%} are 1)".format(
            facts["label_mean"], *facts["label_shares"]
        )
    for key, what in (
        ("cut", "cut off at max_length"),
        ("without_target", "without a target, left out"),
    ):
        if facts[key]:
            line += f"; {facts[key]} ({facts[key] / facts['examples']:.1%}) {what}"
    if facts.get("labels_left_out"):
        line += (
            f"; {facts['labels_left_out']} labelled steps do not fit max_length and are left out"
        )
    return line
