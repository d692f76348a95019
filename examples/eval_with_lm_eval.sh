#!/usr/bin/env bash
# Scores what a rollout server serves with lm-evaluation-harness, over the OpenAI routes: the base, and the policy as it trains.
#
#   rollout-server Qwen/Qwen2.5-0.5B-Instruct --port 8000         # and a training, running or finished, on it
#   pip install 'lm_eval[api]'
#   examples/eval_with_lm_eval.sh
#   TASKS=gsm8k CHAT=1 LIMIT=50 examples/eval_with_lm_eval.sh
#
#   ROLLOUT_URL   of the server
#   MODEL         the server's model, a name of the hub or a directory: its tokenizer is loaded here
#   SERVED        names to score; by default the base and all runs, as GET /v1/models lists them
#   TASKS, LIMIT  lm-eval's --tasks and --limit; further arguments go to lm_eval as they are
#   CHAT=1        ask by chat completions, for tasks that generate; else by completions, also for tasks that need logprobs
#   OPENAI_API_KEY  the token, where the server requires one
set -euo pipefail

url=${ROLLOUT_URL:-http://127.0.0.1:8000}
model=${MODEL:-Qwen/Qwen2.5-0.5B-Instruct}
tasks=${TASKS:-arc_easy}
names='import json, sys; print(*(model["id"] for model in json.load(sys.stdin)["data"]))'
if [ -z "${SERVED:-}" ]; then
  SERVED=$(curl --fail --silent --show-error ${OPENAI_API_KEY:+-H "Authorization: Bearer $OPENAI_API_KEY"} "$url/v1/models" | python3 -c "$names")
fi

for name in $SERVED; do
  if [ -n "${CHAT:-}" ]; then
    kind=(--model local-chat-completions --apply_chat_template)
    args=model=$name,base_url=$url/v1/chat/completions,num_concurrent=8
  else
    kind=(--model local-completions)
    args=model=$name,base_url=$url/v1/completions,tokenizer=$model,tokenizer_backend=huggingface,num_concurrent=8
  fi
  echo "== $name"
  lm_eval "${kind[@]}" --model_args "$args" --tasks "$tasks" ${LIMIT:+--limit "$LIMIT"} "$@"
done
