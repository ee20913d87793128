"""What answers requests: one Ray Serve application, an OpenAI-compatible endpoint next to streams.

`app` builds and runs it; `ingress` is the HTTP side (`chat_routes`, `stream_routes`, `bodies`, `refusals`);
`student_app` and `stream_app` hold the models, as thin shells around `student` and `stream_host`.
"""
