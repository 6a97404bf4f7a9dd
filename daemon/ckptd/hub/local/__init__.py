"""A Hub on loopback: what the real huggingface_hub client speaks, kept in one folder.

It is the embedded default of `ckptd demo` and `ckptd hub serve`, and the server that ckptd's own
tests publish to. Three rings, each knows only those before it:

    values, names, refusal          what a repo is; what the Hub says no with
    blobs, store, history, ...      the repos on disk, free of HTTP
    wire, routes/, pages, traffic   HTTP; `app` puts it together, `server` runs it

Promises: an answered request is on disk (temporary name, fsync, rename) and survives a kill;
content is named by its sha256 and checked while it streams in; memory does not grow with file
size; bound to loopback unless told otherwise.
"""
