"""Local tasks for lm-eval: two YAML files and their questions."""

from __future__ import annotations

import json
from pathlib import Path

CHOICE, ANSWER = "toy_choice", "toy_answer"
QUESTIONS = [
    {"question": f"The quick brown {animal}", "choices": [" jumps over", " is lazy"], "answer": i % 2}
    for i, animal in enumerate(["fox", "dog", "cat", "cow"])
]


def write_tasks(folder: Path) -> Path:
    """Write a multiple-choice task, which needs logprobs of given tokens, and a generation task."""
    questions = folder / "questions.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    common = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {questions}}}}}\ntest_split: test\n"
    common += 'doc_to_text: "{{question}}"\ntarget_delimiter: ""\n'
    (folder / f"{CHOICE}.yaml").write_text(
        f"task: {CHOICE}\n{common}output_type: multiple_choice\n"
        "doc_to_choice: choices\ndoc_to_target: answer\nmetric_list: [{metric: acc}]\n"
    )
    (folder / f"{ANSWER}.yaml").write_text(
        f'task: {ANSWER}\n{common}output_type: generate_until\ndoc_to_target: "{{{{choices[answer]}}}}"\n'
        "generation_kwargs: {until: ['rain'], max_gen_toks: 8}\nmetric_list: [{metric: exact_match}]\n"
    )
    return folder
