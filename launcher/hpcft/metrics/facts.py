"""What every metric is: its scale, which direction is better, and what it says, in one table."""

from __future__ import annotations

from dataclasses import dataclass

SHARE = "0 to 1"


@dataclass(frozen=True)
class MetricInfo:
    """What to know of a metric to read it."""

    description: str
    """What it says, in a line."""
    higher_is_better: bool | None = True
    """None: neither, it is there to compare with."""
    scale: str = SHARE
    """Lowest and highest value."""


# A name that ends in `[]` stands for one with each label between the brackets.
FACTS: dict[str, MetricInfo] = {
    "loss": MetricInfo("cross-entropy that was trained on", False, "0 up"),
    "accuracy": MetricInfo("share of the examples that are right"),
    "majority": MetricInfo("share of the most frequent label: what a constant answer scores", None),
    "precision": MetricInfo("of two labels that of the second, else the mean over the labels"),
    "recall": MetricInfo("of two labels that of the second, else the mean over the labels"),
    "f1": MetricInfo(
        "of two labels that of the second, else the mean; of answers, over shared words"
    ),
    "f1_macro": MetricInfo("mean of the labels' F1"),
    "f1_micro": MetricInfo("F1 of all decisions; the accuracy, where every example got an answer"),
    "matthews": MetricInfo(
        "correlation of true and given labels; 0: as by chance", True, "-1 to 1"
    ),
    "precision[]": MetricInfo("share of the examples given this label that have it"),
    "recall[]": MetricInfo("share of the examples that have this label that were given it"),
    "f1[]": MetricInfo("harmonic mean of this label's precision and recall"),
    "no_answer": MetricInfo(
        "share of the examples with an answer that is none of the labels", False
    ),
    "exact": MetricInfo("share of the questions whose answer equals a true one (SQuAD)"),
    "HasAns_exact": MetricInfo("`exact` over the questions that have an answer"),
    "HasAns_f1": MetricInfo("`f1` over the questions that have an answer"),
    "NoAns_exact": MetricInfo("`exact` over the questions that have none"),
    "NoAns_f1": MetricInfo("`f1` over the questions that have none"),
    "best_exact": MetricInfo("`exact` at the threshold that is best on these very questions"),
    "best_f1": MetricInfo("`f1` at the threshold that is best on these very questions"),
    "best_exact_thresh": MetricInfo("that threshold", None, "any"),
    "best_f1_thresh": MetricInfo("that threshold", None, "any"),
    "bleu": MetricInfo("BLEU-4 over all answers together (sacrebleu, which prints per cent)"),
    "rouge1": MetricInfo("mean F1 over words with the nearest true answer"),
    "rouge2": MetricInfo("mean F1 over pairs of words with the nearest true answer"),
    "rougeL": MetricInfo("mean F1 over the longest common sequence of words, likewise"),
    "meteor": MetricInfo("mean METEOR of equal words and equal stems, without WordNet's synonyms"),
    "completion_loss": MetricInfo("mean cross-entropy over the completions' tokens", False, "0 up"),
    "masked_loss": MetricInfo("mean cross-entropy over the masked tokens", False, "0 up"),
    "perplexity": MetricInfo("exp of that mean over all tokens, not over batches", False, "1 up"),
    "masked_accuracy": MetricInfo("share of the masked tokens that are guessed"),
    "next_sentence_accuracy": MetricInfo("share of the pairs that are told right"),
}


def metric_info(name: str) -> MetricInfo | None:
    """What is known of a metric; None of one that is not ours, as reports may have it."""
    general, bracket, _ = name.partition("[")
    return FACTS.get(f"{general}[]" if bracket else name)


def lower_is_better(name: str) -> bool:
    """Whether the lowest value is the best."""
    known = metric_info(name)
    return known is not None and known.higher_is_better is False


def arrow(name: str) -> str:
    """`↑` where higher is better, `↓` where lower is, else nothing."""
    known = metric_info(name)
    if known is None or known.higher_is_better is None:
        return ""
    return "↑" if known.higher_is_better else "↓"
