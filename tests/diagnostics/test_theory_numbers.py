"""The sentences of docs/results/audit.md and forecast.md have the numbers of the result files."""

import pytest
from sentences import check, document

AUDIT = [
    ("a correlation of {} on the states that were trained on and {} on held-out ones, with one sign in {%} %",
     "audit/exact/pearson", "audit/held_out/exact/pearson", "audit/exact/sign_agreement"),
    ("without the trend of a run as well: {} and {}",
     "audit/exact/detrended_spearman", "audit/held_out/exact/detrended_spearman"),
    ('sign agrees in {} of the updates under AdamW and in {} under SGD, but "it falls", said every time, agrees in all '
     "and in {}", "audit/local/sign_agreement", "audit-sgd/local/sign_agreement", "audit-sgd/cheap/falls"),
    ('the local sign is right in {%} %, and "it falls" in {%} %',
     "audit-held/local/sign_agreement", "audit-held/cheap/falls"),
    ("under AdamW is {}, there {}", "audit/local/spearman", "audit-held/local/spearman"),
    ("with them r² is {}, without them {}, a difference of {} [{}, {}]",
     "audit/explained/exact/r2", "audit/explained/preconditioned/r2", "audit/explained/exact/difference["),
    ("without it {} and {}, a difference of {} [{}, {}]",
     "audit/explained/exact/detrended_r2", "audit/explained/preconditioned/detrended_r2",
     "audit/explained/exact/detrended_difference["),
    ("Knowing of shared parameters adds {} [{}, {}], on held-out states {} [{}, {}]; with SGD and no momentum "
     "{} and {}",
     "audit/explained/shared/difference[", "audit/held_out/explained/shared/difference[",
     "audit-sgd/explained/shared/difference", "audit-sgd/held_out/explained/shared/difference"),
    ("rank correlation is {} (held out {}) there", "audit-sgd/local/spearman", "audit-sgd/held_out/local/spearman"),
    ("with a smaller learning rate ({}) and with a larger policy ({}) cannot be told from the {}",
     "audit-small/local/spearman", "audit-larger/local/spearman", "audit/local/spearman"),
    ('The sign is right in {%} % of tokens, where "it falls", said of each, is right in {%} %; each token counted by '
     "|P|, in {%} % against {%} %",
     *(f"audit/tokens/local_{figure}" for figure in
       ("sign_agreement", "falls", "weighted_sign_agreement", "weighted_falls"))),
    ('rank correlation {}, sign right in {%} %, "it falls" in {%} %',
     *(f"audit/tokens/state_{figure}" for figure in ("spearman", "sign_agreement", "falls"))),
    ("agree in sign on {%} % of the tokens**, each counted alike, and on {%} % of the pressure",
     "audit/tokens/sensitivity_sign_agreement", "audit/tokens/sensitivity_weighted_sign_agreement"),
]  # fmt: skip
FORECAST = [
    ("its rank correlation is {} against {} and its error {} against {}, on held-out states {} against {} and {} "
     "against {}; with SGD {} against {} and {} against {}",
     *(f"audit-held/{states}cheap/{name}/{figure}" for states in ("", "held_out/")
       for figure in ("spearman", "error") for name in ("forecast", "the last change")),
     *(f"audit-sgd/cheap/{name}/{figure}"
       for figure in ("spearman", "error") for name in ("forecast", "the last change"))),
    ("Signs: {%} and {%} % where it is held, where the last change has {%} %",
     "audit-held/cheap/forecast/sign_agreement", "audit-held/held_out/cheap/forecast/sign_agreement",
     "audit-held/cheap/the last change/sign_agreement"),
    ("The rank correlation is {}, but a run's trend makes most of it: {} without",
     "audit/cheap/forecast/spearman", "audit/cheap/forecast/detrended_spearman"),
    ("The last change has {} and {}, and an equal error, {};",
     "audit/cheap/the last change/spearman", "audit/cheap/the last change/detrended_spearman",
     "audit/cheap/the last change/error"),
    ("a smaller one, {} against {}",
     "audit/held_out/cheap/the last change/error", "audit/held_out/cheap/forecast/error"),
    ("only falls ({} to {}) and not where it is held ({} to {})",
     *(f"{name}/cheap/forecast/{figure}" for name in ("audit", "audit-held") for figure in ("error", "fitted/error"))),
    ("fitted, has an error of {}; the mean of the changes so far, fitted alike, has {}",
     "audit/cheap/local/fitted/error", "audit/cheap/the mean so far/fitted/error"),
    ("ranks the updates of the held run at {}", "audit-held/cheap/momentum/spearman"),
    ("rank the updates at {}, the norms at {} and all parameters at {}",
     *(f"parts/summary/shared/{part}/spearman" for part in ("embeddings and head", "norms", "all parameters"))),
]  # fmt: skip


@pytest.mark.parametrize("sentence", AUDIT, ids=lambda sentence: sentence[0][:40])
def test_a_sentence_on_the_audit_has_the_numbers_of_the_files(sentence):
    check("results/audit.md", *sentence)


@pytest.mark.parametrize("sentence", FORECAST, ids=lambda sentence: sentence[0][:40])
def test_a_sentence_on_the_forecast_has_the_numbers_of_the_files(sentence):
    check("results/forecast.md", *sentence)


def test_the_errors_that_are_called_equal_are():
    cheap = document("audit")["cheap"]
    assert f"{cheap['forecast']['error']['value']:.2f}" == f"{cheap['the last change']['error']['value']:.2f}"
