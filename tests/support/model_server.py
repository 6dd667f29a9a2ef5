"""A stand-in of vLLM's OpenAI server, and of SGLang's, around a small model of transformers.

Adapters are read by PEFT from the files that a client names, when it has them loaded.

What it sends has the shape of what they send, to the key: tests/engine/test_served_teacher.py holds
it against replies of vLLM 0.32 that were recorded (tests/support/vllm_replies.json).
"""

import copy
import json
import socket
import struct
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from peft import PeftModel


class ModelServer:
    """Answers of a model, and faults on demand.

    Attributes:
        adapters: {name: (path, model)} of those that are loaded.
        faults: what becomes of the next requests to generate, first one first: a status, or
            "reset", "hang", "truncated", "cut" (a whole reply of half a JSON) or "drip".
        requests: bodies that came, in order.
        changes: ("load" or "unload", name) of adapters, in order.
        most_at_once: requests that were in work together.
    """

    def __init__(
        self,
        model,
        tokenizer=None,
        name="tiny",
        *,
        max_logprobs=20,
        max_model_len=128,
        delay_s=0.0,
        key=None,
        max_lora_rank=8,
    ):
        self.model, self.tokenizer, self.name = model.eval(), tokenizer, name
        self.max_logprobs, self.max_model_len = max_logprobs, max_model_len
        self.delay_s, self.key, self.max_lora_rank = delay_s, key, max_lora_rank
        self.adapters: dict = {}
        self.changes: list[tuple[str, str]] = []
        self.faults: list = []
        self.requests: list[dict] = []
        self.most_at_once = self._now = 0
        self._lock = threading.Lock()
        self.stopping = threading.Event()

    @contextmanager
    def working(self):
        with self._lock:
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            yield
        finally:
            with self._lock:
                self._now -= 1

    def next_fault(self):
        with self._lock:
            return self.faults.pop(0) if self.faults else None

    # --- what they answer

    def answered(self, path, body):
        ways = {
            "/v1/completions": self.completions,
            "/v1/load_lora_adapter": self.load,
            "/v1/unload_lora_adapter": self.unload,
            "/generate": self.generate,
        }
        return ways[path](body)

    def models(self):
        cards = [card(self.name, self.name, None, self.max_model_len)]
        cards += [card(name, path, self.name, None) for name, (path, _) in self.adapters.items()]
        return 200, {"object": "list", "data": cards}

    def load(self, body):
        name, path = body["lora_name"], body["lora_path"]
        if name in self.adapters and not body.get("load_inplace"):
            told = (
                f"The lora adapter '{name}' has already been loaded. If you want to load the "
                "adapter in place, set 'load_inplace' to True."
            )
            return 400, refusal(told, "InvalidUserInput", None, 400)
        if not Path(path, "adapter_config.json").is_file():
            told = f"Loading lora {name} failed: No adapter found for <path>"
            return 404, refusal(told, "NotFoundError", None, 404)
        rank = json.loads(Path(path, "adapter_config.json").read_text())["r"]
        fault = None
        if self.max_lora_rank is None:
            fault = "LoRA is not enabled. Use --enable-lora to enable LoRA."
        elif rank > self.max_lora_rank:
            fault = f"LoRA rank {rank} is greater than max_lora_rank {self.max_lora_rank}."
        if fault is not None:
            told = (
                f"Call to add_lora method failed: Worker failed with error '{fault}', please "
                "check the stack trace above for the root cause"
            )
            return 500, refusal(told, "InternalServerError", None, 500)
        model = PeftModel.from_pretrained(copy.deepcopy(self.model), path).eval()
        self.adapters[name] = path, model
        self.changes.append(("load", name))
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def unload(self, body):
        name = body["lora_name"]
        if not name:
            told = "'lora_name' needs to be provided to unload a LoRA adapter."
            return 400, refusal(told, "InvalidUserInput", None, 400)
        if name not in self.adapters:
            told = f"The lora adapter '{name}' cannot be found."
            return 404, refusal(told, "NotFoundError", None, 404)
        del self.adapters[name]
        self.changes.append(("unload", name))
        return 200, f"Success: LoRA adapter '{name}' removed successfully."

    @torch.no_grad()
    def log_probs(self, ids, name=None):
        model = self.adapters[name][1] if name in self.adapters else self.model
        return model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)

    def token(self, index):
        return "" if self.tokenizer is None else self.tokenizer.decode([index])

    def completions(self, body):
        if body["model"] != self.name and body["model"] not in self.adapters:
            told = f"The model `{body['model']}` does not exist. Valid aliases: {self.name}."
            return 404, refusal(told, "NotFoundError", "model", 404)
        number = body.get("prompt_logprobs")
        if number is not None and number > self.max_logprobs:
            told = (
                f"Requested prompt logprobs of {number}, which is greater than max allowed: "
                f"{self.max_logprobs} (parameter=prompt_logprobs, value={number})"
            )
            return 400, refusal(told, "BadRequestError", "prompt_logprobs", 400)
        prompts = body["prompt"]
        if isinstance(prompts, str):
            prompts = [self.tokenizer(prompts, add_special_tokens=False)["input_ids"]]
        elif isinstance(prompts[0], int):
            prompts = [prompts]
        for ids in prompts:
            if max(ids) >= self.model.config.vocab_size:
                told = f"Token id {max(ids)} is out of vocabulary"
                return 400, refusal(told, "BadRequestError", None, 400)
            if len(ids) >= self.max_model_len:
                told = "max_tokens must be at least 1, got 0. (parameter=max_tokens, value=0)"
                return 400, refusal(told, "BadRequestError", "max_tokens", 400)
            if len(ids) + body.get("max_tokens", 16) > self.max_model_len:
                told = "max_tokens is too large"
                return 400, refusal(told, "BadRequestError", "max_tokens", 400)
        choices = [self.choice(index, ids, body) for index, ids in enumerate(prompts)]
        lengths = sum(map(len, prompts)), sum(len(choice.pop("new")) for choice in choices)
        return 200, {
            "id": "cmpl-0",
            "object": "text_completion",
            "created": 1,
            "model": body["model"],
            "choices": choices,
            "service_tier": None,
            "system_fingerprint": "vllm-0.32.0-e241e89e",
            "usage": {
                "prompt_tokens": lengths[0],
                "total_tokens": sum(lengths),
                "completion_tokens": lengths[1],
                "prompt_tokens_details": None,
                "completion_tokens_details": None,
            },
            "kv_transfer_params": None,
            "ec_transfer_params": None,
            "metrics": None,
        }

    def choice(self, index, ids, body):
        told = None
        if body.get("prompt_logprobs") is not None:
            log_probs, told = self.log_probs(ids), [None]
            for place, token in enumerate(ids[1:]):
                told.append(self.entry(log_probs[place], token, body["prompt_logprobs"]))
        new, rows = self.generated(ids, body)
        wants_ids = body.get("return_token_ids")
        return {
            "index": index,
            "text": "" if self.tokenizer is None else self.tokenizer.decode(new),
            "logprobs": self.logprobs(new, rows, body),
            "finish_reason": "stop" if new[-1] in self.stops(body) else "length",
            "stop_reason": None,
            "token_ids": new if wants_ids else None,
            "prompt_logprobs": told,
            "prompt_token_ids": ids if wants_ids else None,
            "routed_experts": None,
            "new": new,
        }

    def stops(self, body):
        end = set() if body.get("ignore_eos") else {self.model.config.eos_token_id}
        return end | set(body.get("stop_token_ids") or ())

    def generated(self, ids, body):
        """Tokens, the one that ended the text among them, and the log-probabilities [n, V] behind
        each, before what was asked for changed them."""
        seed, temperature = body.get("seed"), body.get("temperature", 1.0)
        generator = torch.Generator().manual_seed(0 if seed is None else seed)
        bias = {int(token): value for token, value in (body.get("logit_bias") or {}).items()}
        stop, new, rows = self.stops(body), [], []
        while len(new) < body.get("max_tokens", 16):
            row = self.log_probs([*ids, *new], body["model"])[-1]
            rows.append(row)
            row = row.clone()
            for token, value in bias.items():
                row[token] += value
            if temperature == 0:
                token = int(row.argmax())
            else:
                token = int(
                    torch.multinomial((row / temperature).softmax(-1), 1, generator=generator)
                )
            new.append(token)
            if token in stop:
                break
        return new, rows

    def logprobs(self, new, rows, body):
        if body.get("logprobs") is None:
            return None
        names = [f"token_id:{token}" for token in new]
        own = [row[token].item() for token, row in zip(new, rows, strict=True)]
        top = []
        for name, value, row in zip(names, own, rows, strict=True):
            best = row.topk(body["logprobs"])
            pairs = zip(*map(torch.Tensor.tolist, best), strict=True)
            top.append({name: value} | {f"token_id:{index}": value for value, index in pairs})
        offsets = [sum(map(len, names[:index])) for index in range(len(names))]
        return {"text_offset": offsets, "token_logprobs": own, "tokens": names, "top_logprobs": top}

    def entry(self, row, token, top_k):
        found = {str(token): (row[token].item(), int((row >= row[token]).sum()))}
        top = row.topk(top_k)
        for rank, (value, index) in enumerate(zip(*map(torch.Tensor.tolist, top), strict=True), 1):
            found[str(index)] = (value, rank)
        return {
            key: {"logprob": value, "rank": rank, "decoded_token": self.token(int(key))}
            for key, (value, rank) in found.items()
        }

    def generate(self, body):
        """SGLang's."""
        texts = body.get("input_ids")
        if texts is None:
            texts = [self.tokenizer(body["text"], add_special_tokens=False)["input_ids"]]
        replies = []
        for ids in texts:
            log_probs = self.log_probs(ids)
            own, top = [[None, ids[0], None]], [None]
            for place, token in enumerate(ids[1:]):
                own.append([log_probs[place, token].item(), token, None])
                best = log_probs[place].topk(body["top_logprobs_num"])
                pairs = zip(*map(torch.Tensor.tolist, best), strict=True)
                top.append([[value, index, None] for value, index in pairs])
            info = {
                "id": "0",
                "finish_reason": {"type": "length", "length": 0},
                "prompt_tokens": len(ids),
                "completion_tokens": 0,
                "input_token_logprobs": own,
                "input_top_logprobs": top,
                "output_token_logprobs": [],
                "output_top_logprobs": [],
            }
            replies.append({"text": "", "output_ids": [], "meta_info": info})
        return 200, replies[0] if "text" in body else replies


def card(name, root, parent, max_model_len):
    return {
        "id": name,
        "object": "model",
        "created": 1,
        "owned_by": "vllm",
        "root": root,
        "parent": parent,
        "max_model_len": max_model_len,
        "permission": [_PERMISSION],
    }


_PERMISSION = {
    "id": "modelperm-0",
    "object": "model_permission",
    "created": 1,
    "allow_create_engine": False,
    "allow_sampling": True,
    "allow_logprobs": True,
    "allow_search_indices": False,
    "allow_view": True,
    "allow_fine_tuning": False,
    "organization": "*",
    "group": None,
    "is_blocking": False,
}


def refusal(message, kind, param, code):
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    @property
    def own(self) -> ModelServer:
        return self.server.own

    def do_GET(self):
        if self.refused():
            return
        self.send(*(self.own.models() if self.path == "/v1/models" else (404, {})))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.refused():
            return
        self.own.requests.append(body)
        fault = self.own.next_fault()
        if fault == "reset":
            linger = struct.pack("ii", 1, 0)  # closes by a reset
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.connection.close()
            self.close_connection = True
        elif fault == "hang":
            self.own.stopping.wait(30)
            self.close_connection = True
        elif isinstance(fault, int):
            self.send(fault, {"error": {"message": "engine is not ready"}})
        else:
            with self.own.working():
                time.sleep(self.own.delay_s)
                status, reply = self.own.answered(self.path, body)
            self.send(status, reply, fault)

    def refused(self) -> bool:
        if self.own.key is None or self.headers["Authorization"] == f"Bearer {self.own.key}":
            return False
        self.send(401, {"error": "Unauthorized"})
        return True

    def send(self, status, reply, fault=None):
        data = (reply if isinstance(reply, str) else json.dumps(reply)).encode()
        if fault == "cut":
            data = data[: len(data) // 2]
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if fault == "truncated":
            data = data[: len(data) // 2]
            self.close_connection = True
        try:
            if fault == "drip":
                for start in range(0, len(data), 16):
                    self.wfile.write(data[start : start + 16])
                    if self.own.stopping.wait(0.05):
                        return
            else:
                self.wfile.write(data)
        except OSError:  # the client went away
            self.close_connection = True


class _Listening(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request, client_address):
        pass


@contextmanager
def serving(own: ModelServer):
    """The address of a server that runs meanwhile."""
    with _Listening(("127.0.0.1", 0), Handler) as server:
        server.own = own
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            own.stopping.set()
            server.shutdown()
            thread.join()
