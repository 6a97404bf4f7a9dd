"""The endpoints, by what they are about; each module gives its `routes(hub)`.

Paths and bodies are those that huggingface_hub 2.4 sends. A repo is `/KIND/NAMESPACE/NAME`; a
revision, and a path below it in the API, is one percent-encoded segment.
"""
