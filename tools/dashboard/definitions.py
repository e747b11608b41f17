"""What every number of the dashboard means: shown on the page when the number is clicked.

A definition is (name, formula, what it says, range, what random routing would give, how it was reduced). N tokens in
the window, E routed experts, k chosen a token, c_e assignments of expert e, f_e = c_e / sum c, scores s that sum to 1
over the experts of a token, P_e their mean, logits z. Logarithms are natural.
"""

_COUNTED = (
    "Assignments summed over micro-batches and ranks before any ratio; before capacity drops some; padding left out; "
    "only routed experts."
)
_SAMPLED = "Mean over a sample of the window's tokens (the recorder's option), over micro-batches and ranks."
_PROBED = "On the frozen probe batch, exactly, never on training batches."

DEFINITIONS: dict[str, tuple[str, str, str, str, str, str]] = {
    "collapse_aware_entropy": (
        "Collapse-aware entropy",
        "(H − ln k) / (ln E − ln k),  H = −Σ f ln f",
        "How evenly the load is spread. The plain load entropy cannot fall below ln k / ln E, because the k experts of "
        "a token differ; this one reads 0 when all tokens take the same k experts.",
        "0 (collapse) to 1 (even)",
        "1 less about (E − k) / (2 N k (ln E − ln k))",
        _COUNTED,
    ),
    "load_entropy": (
        "Load entropy",
        "H / ln E,  H = −Σ f ln f",
        "How evenly the load is spread, with the floor ln k / ln E.",
        "ln k / ln E to 1",
        "about 1 − (E − k) / (2 N k ln E)",
        _COUNTED,
    ),
    "max_violation": (
        "MaxVio",
        "max c / mean c − 1",
        "By how much the busiest expert exceeds its fair share.",
        "0 (even) to E/k − 1",
        "up to about √(2 ln E (1 − k/E) / (N k / E)), the shaded band",
        _COUNTED,
    ),
    "dead": (
        "Dead fraction",
        "share of experts with f < 0.05 / E",
        "Experts that get less than a twentieth of their fair share. The threshold is relative, because with many "
        "experts the fair share itself is small.",
        "0 to 1",
        "0 once the fair share is some 20 assignments or more",
        _COUNTED,
    ),
    "drop_rate": (
        "Drop rate",
        "dropped / requested assignments",
        "What capacity cut off.",
        "0 to 1",
        "0 without capacity",
        "Summed over micro-batches and ranks before the ratio.",
    ),
    "balance": (
        "Balance loss",
        "E Σ f P",
        "The quantity that the usual auxiliary loss minimises, unweighted and already divided by k: it can be compared "
        "between frameworks.",
        "1 (even) to E",
        "1",
        _COUNTED + " P over a sample of tokens.",
    ),
    "information": (
        "Routing information",
        "(H(P) − mean H(s)) / ln E",
        "How much a token decides: 0 means that the scores ignore the token, be it for collapse (low entropy) or for "
        "indifference (high entropy); high means specialisation.",
        "0 to 1",
        "0",
        _SAMPLED,
    ),
    "token_entropy": (
        "Token entropy",
        "mean −Σ s ln s / ln E",
        "How undecided the router is about one token. Low is confidence or collapse: read it beside the load entropy.",
        "0 (sure) to 1 (indifferent)",
        "1 for equal scores",
        _SAMPLED,
    ),
    "mass": (
        "Top-k mass",
        "mean Σ of the chosen experts' s",
        "How much of the scores the chosen experts hold; the rest is what the choice throws away.",
        "k/E to 1",
        "k/E for equal scores",
        _SAMPLED,
    ),
    "z": (
        "z-loss",
        "mean (logsumexp z)²",
        "How large the logits have grown.",
        "0 and more",
        "(ln E)² at z = 0",
        _SAMPLED,
    ),
    "logit_scale": (
        "Logit scale",
        "√ mean z²",
        "How large the logits are; a steady climb makes the router deaf to later tokens.",
        "0 and more",
        "none",
        _SAMPLED,
    ),
    "close_calls": (
        "Close calls",
        "share of tokens with (z₍ₖ₎ − z₍ₖ₊₁₎) / sd(z) < 0.1",
        "Tokens whose last expert would change under a little noise, dropout, rounding, or without a neighbour.",
        "0 to 1",
        "depends on E and k",
        _SAMPLED,
    ),
    "margin": (
        "Margin",
        "(z₍ₖ₎ − z₍ₖ₊₁₎) / sd(z) of each token",
        "How far the last chosen expert is ahead of the first one left out, in the token's own spread of logits.",
        "0 and more (a choice steered by a bias falls in the first bin)",
        "depends on E and k",
        _SAMPLED,
    ),
    "active": (
        "Experts a token",
        "Σ m of each token",
        "How many routed experts a token has. One bar where k is fixed.",
        "0 to E",
        "k",
        _SAMPLED,
    ),
    "drift": (
        "Load drift",
        "½ Σ |f(t) − f(t − 1)|",
        "Share of the load that moved to other experts since the window before.",
        "0 to 1",
        "about √((E − k) / (π N k)), from sampling alone",
        _COUNTED,
    ),
    "load": (
        "Load",
        "c / mean c",
        "Times the fair share: 1 = fair, 2 = twice as much. The map is logarithmic and clipped at ¼ and 4, and what is "
        "clipped is marked.",
        "0 to E/k",
        "1 ± √((1 − k/E) / (N k / E))",
        _COUNTED + " Stored in 255 logarithmic steps of 3.3 %.",
    ),
    "drop_position": (
        "Drops by position",
        "dropped / requested, by sixteenth of the sequence",
        "Whether late tokens pay for early ones.",
        "0 to 1",
        "flat",
        "Summed over the last tenth of the run.",
    ),
    "saturation": (
        "Saturation",
        "mean |S(t) ∩ S(T)| / k",
        "How much of the final choice a token's experts already are at step t; S the set of its experts, T the last "
        "probe.",
        "0 to 1",
        "k/E, the dashed line",
        _PROBED,
    ),
    "overlap": (
        "Overlap",
        "mean |S(t) ∩ S(t′)| / k",
        "How alike two checkpoints choose.",
        "0 to 1",
        "k/E",
        _PROBED,
    ),
    "fluctuation": (
        "Fluctuation",
        "1 − mean |S(t) ∩ S(t − 1)| / k",
        "Share of choices that changed since the probe before.",
        "0 to 1",
        "1 − k/E",
        _PROBED,
    ),
    "fluctuation_first": (
        "Fluctuation of the first expert",
        "share of tokens whose first expert differs from the probe before",
        "How often the leading choice flips.",
        "0 to 1",
        "1 − 1/E",
        _PROBED,
    ),
    "settled": (
        "Settled at",
        "first probe from which on 95 % of tokens keep their first expert to the end",
        "When the leading choice stopped moving.",
        "a step, or never",
        "never",
        _PROBED,
    ),
    "lift": (
        "Co-activation lift",
        "P(j | i) (E − 1) / (k − 1)",
        "How much more often than by chance j is chosen where i is. All pairs of a token's experts count, not only "
        "neighbours in rank.",
        "0 to (E − 1)/(k − 1)",
        "1",
        "Tokens of one sampled step.",
    ),
    "flow": (
        "Cross-layer flow",
        "n_ij n / (n_i n_j)",
        "How much more often than by chance a token goes from expert i of a layer to expert j of the next. All k² "
        "pairs of a token count.",
        "0 and more",
        "1",
        "Tokens of one sampled step.",
    ),
    "cosine": (
        "Prototype cosine",
        "⟨w_i, w_j⟩ / (|w_i| |w_j|)",
        "How alike two experts' prototypes, or router rows, are. Near 1: the router cannot tell them apart.",
        "−1 to 1",
        "0 ± 1/√D",
        "The parameters themselves.",
    ),
    "share": (
        "Share of a label's tokens",
        "n(expert, label) / n(label)",
        "Which part of a label's tokens have this expert among their k.",
        "0 to 1",
        "k/E: drawn as the neutral colour",
        _PROBED,
    ),
    "nmi": (
        "NMI",
        "2 I(label; expert) / (H(label) + H(expert)) − its mean over permuted labels",
        "How much the label tells of the expert. Without the correction, rare labels look informative.",
        "about 0 to 1",
        "0; the band reaches to the 95th percentile of permutations",
        _PROBED,
    ),
    "context": (
        "Context dependence",
        "H(expert | id) / H(expert), ids with at least 10 occurrences",
        "0 = routing is a look-up of the token id, 1 = the id says nothing.",
        "0 to 1",
        "the value with shuffled ids, below 1 for few tokens",
        _PROBED,
    ),
    "vocabulary": (
        "Vocabulary specialisation",
        "share of an id's occurrences at its commonest first expert, ids with at least 10 occurrences, weighted by "
        "count",
        "How much an id belongs to one expert.",
        "1/E to 1",
        "the value with shuffled ids; biased up for rare ids",
        _PROBED,
    ),
}
