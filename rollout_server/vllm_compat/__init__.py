"""The only room that patches vLLM or reads its private parts."""
