"""One local process behind the OpenAI API: an endpoint is one file in `endpoints/`; `app.create` joins them, `run.serve` listens."""
