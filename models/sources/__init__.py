"""Where checkpoints come from, and what the files are before anybody computes with them.

    locate       a source as pool.yaml writes it → a folder or a .gguf file on this machine; the
                 Hub's are held to one revision by a lock file beside the pool
    safetensors  the tensors of a folder, from the headers alone
    gguf         a GGUF file: its facts and tensors (`gguf_tokenizer`: its tokenizer)

None of it reads weights or imports a tensor library, so that every replica can look.
"""
