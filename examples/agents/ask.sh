#!/bin/sh
# An agent that is a program: it asks the question with curl, and writes its reward to a file.
#   learner train --config recipes/agent.yaml --model_name_or_path demo-model --output_dir runs/program \
#       --agent null --agent_command "sh examples/agents/ask.sh" --rollout_url http://127.0.0.1:8000
set -eu

body=$(python3 -c '
import json, sys
row = json.load(open(sys.argv[1]))
prompt = row["prompt"]
messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
print(json.dumps({"model": sys.argv[2], "messages": messages, "max_tokens": 16}))
' "$LOCKSTEP_ROW_FILE" "$OPENAI_MODEL")

curl --silent --show-error --fail-with-body --max-time 300 "$OPENAI_BASE_URL/chat/completions" \
    --header "Authorization: Bearer $OPENAI_API_KEY" --header "Content-Type: application/json" --data "$body" |
    python3 -c '
import json, re, sys
row = json.load(open(sys.argv[1]))
text = json.load(sys.stdin)["choices"][0]["message"]["content"] or ""
numbers = re.findall(r"-?\d+", text)
print(float(bool(numbers) and numbers[-1] == str(row.get("answer"))))
' "$LOCKSTEP_ROW_FILE" > "$LOCKSTEP_REWARD_FILE"
