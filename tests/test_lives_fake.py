"""Lives that only fakes can show: engines that die of a prompt or load for ever."""

import json



def test_one_poisonous_prompt_is_failed_and_no_other(site_on):
    site = site_on()
    site.config(environment={"vars": {"FAKE_LLAMA_POISON": "Question 3:", "FAKE_LLAMA_TTFT_S": "0.2"}})
    site.llmrun("submit", "config.json")
    state = site.ended(code=1)
    assert state["done"] == 5 and state["failed"] == 1
    failed = json.loads((site.run / "results" / "errors.jsonl").read_text())
    assert failed["custom_id"].endswith("003.txt") and "in flight when the engine died" in failed["error"]["message"]


def test_starts_that_answer_nothing_end_after_the_third(site_on):
    site = site_on()
    setup = "export SLURM_JOB_END_TIME=$(( $(date +%s) + 16 ))"
    site.config(environment={"setup": [setup], "vars": {"FAKE_LLAMA_LOAD_S": "30"}})
    site.llmrun("submit", "config.json")
    state = site.ended(code=4)
    assert len(site.lives()) == 3 and "slurm] time" in state["detail"] and "3 starts in a row" in state["detail"]
