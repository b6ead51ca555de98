"""Fifty people ask at once: each gets the answer to their own question or is told that the demo is busy."""

import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from gradio_client import Client

from medqa_lib.config import PROFILES
from medqa_lib.prompts import encode_prompt
from medqa_lib.publish.demo import RUNNING, WAITING, Engine
from medqa_lib.publish.hub import find_adapters

pytestmark = pytest.mark.slow
CLIENTS, TOKENS, GROWTH_MB = 50, 8, 300


def memory_mb(pid: int) -> float:
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024


def test_fifty_clients_get_their_own_answer_or_a_clear_busy(demo_server):
    questions = [f"What is disease number {i}?" for i in range(CLIENTS)]
    names = ["exp_003" if i % 2 else "exp_004" for i in range(CLIENTS)]
    patience = {"timeout": 120}  # seconds; httpx gives up after 5, which fifty clients on a busy machine need
    clients = [Client(demo_server.address, verbose=False, httpx_kwargs=patience) for _ in range(CLIENTS)]
    clients[0].predict("Warm up", "exp_004", TOKENS, api_name="/ask")
    before, peak = memory_mb(demo_server.pid), []

    def ask(i):
        try:
            return clients[i].predict(questions[i], names[i], TOKENS, api_name="/ask")
        except Exception as error:
            return error
        finally:
            peak.append(memory_mb(demo_server.pid))

    start = time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as pool:
        found = list(pool.map(ask, range(CLIENTS)))
    elapsed = time.perf_counter() - start
    answered = [i for i in range(CLIENTS) if not isinstance(found[i], Exception)]
    busy = [error for error in found if isinstance(error, Exception)]
    print(
        f"{len(answered)} answered, {len(busy)} busy in {elapsed:.1f} s; memory {before:.0f} -> {max(peak):.0f} MB"
    )
    assert len(answered) >= RUNNING + WAITING // 2
    assert {str(error) for error in busy} <= {"Queue is full! Please try again."}, set(map(repr, busy))
    smoke = (demo_server.home / "adapters" / "smoke-llama").exists()
    profile = PROFILES["smoke" if smoke else "cpu"]
    engine = Engine(find_adapters(demo_server.home / "adapters" / profile.model_slug), profile)
    for i in answered:
        ids = encode_prompt(engine.tokenizer, questions[i])
        texts = [text for text, _ in list(engine.stream(ids, [names[i]], TOKENS))[-1]]
        assert all(map(str.startswith, found[i][:2], texts)), questions[i]  # an answer that was cut says so
    assert max(peak) - before < GROWTH_MB
    assert clients[0].predict("Is it free again?", "exp_004", TOKENS, api_name="/ask")[0]
