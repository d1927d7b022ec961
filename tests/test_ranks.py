"""How ranks are found: variables of launchers, flags, the rendezvous, connections, and the watch over other ranks.

Ranks are threads here, with sockets of this machine. test_rank_faults.py has processes.
"""

import json
import re
import socket
import struct
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest

from handgrad.backends import why_no_cuda
from handgrad.backends.ranks import mesh, processes, rendezvous, startup, watch
from handgrad.backends.ranks.comm import Alone, RankError
from handgrad.backends.ranks.launchers import first_host, from_environment, local_file
from handgrad.backends.ranks.mesh import Listener, addresses
from handgrad.backends.ranks.sockets import CHANNELS, Sockets
from handgrad.backends.ranks.startup import RanksRequest
from handgrad.backends.ranks.watch import Watch
from handgrad.cli.__main__ import main
from handgrad.cli.ranks import requested_ranks
from handgrad.core.errors import HandgradError

TORCHRUN = dict(RANK="3", WORLD_SIZE="4", LOCAL_RANK="1", LOCAL_WORLD_SIZE="2", MASTER_ADDR="h0", MASTER_PORT="29500")
OPEN_MPI = dict(
    OMPI_COMM_WORLD_RANK="1",
    OMPI_COMM_WORLD_SIZE="2",
    OMPI_COMM_WORLD_LOCAL_RANK="1",
    OMPI_COMM_WORLD_LOCAL_SIZE="2",
)
MPICH = dict(PMI_RANK="1", PMI_SIZE="2", MPI_LOCALRANKID="1", MPI_LOCALNRANKS="2")
BATCH = dict(SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_JOB_ID="7", SLURM_NTASKS="4", SLURM_JOB_NODELIST="n[1-2]")
STEP = dict(
    SLURM_PROCID="3",
    SLURM_LOCALID="1",
    SLURM_JOB_ID="7",
    SLURM_STEP_ID="2",
    SLURM_STEP_NUM_TASKS="4",
    SLURM_STEP_TASKS_PER_NODE="2(x2)",
    SLURM_STEP_NODELIST="n[01-02]",
)


def found(env):
    """(launcher, rank, world, local rank, local) by the variables."""
    info = from_environment(env)
    return info and (info.launcher, info.rank, info.world, info.local_rank, info.local_world)


# variables -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "env",
    [
        dict(RANK="0", WORLD_SIZE="2"),
        dict(RANK="0", WORLD_SIZE="2", MASTER_PORT="29500"),
        dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="h0"),
    ],
)
def test_variables_without_a_place_to_meet_are_refused(env):
    """Ranks that train alone by mistake would fight over one folder."""
    with pytest.raises(HandgradError, match="torchrun has started 2 ranks, and nothing says where they meet"):
        startup._open(RanksRequest(), env)


def test_open_mpi_without_local_variables_means_one_machine():
    env = dict(OMPI_COMM_WORLD_RANK="1", OMPI_COMM_WORLD_SIZE="2")
    assert found(env) == ("Open MPI", 1, 2, 1, 2)


def test_no_launcher():
    assert from_environment({}) is None and isinstance(startup._open(RanksRequest(), {}), Alone)


def test_torchrun():
    assert found(TORCHRUN) == ("torchrun", 3, 4, 1, 2)
    assert from_environment(TORCHRUN | {"TORCHELASTIC_RUN_ID": "a"}).run == "a"


@pytest.mark.parametrize(("value", "port"), [(None, 29500), ("False", 29500), ("True", 29501)])
def test_port_of_torchrun_is_not_the_one_its_own_store_has(value, port):
    env = TORCHRUN if value is None else TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": value}
    assert from_environment(env).rendezvous == f"h0:{port}"


def test_torchrun_variables_without_local_ones_mean_one_machine():
    env = {name: TORCHRUN[name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    assert found(env) == ("torchrun", 3, 4, 3, 4)


def test_mpi_launchers():
    assert found(OPEN_MPI) == ("Open MPI", 1, 2, 1, 2)
    assert found(MPICH) == ("MPICH", 1, 2, 1, 2)
    assert from_environment(MPICH).rendezvous == from_environment(OPEN_MPI).rendezvous == local_file(2)
    assert from_environment(MPICH | {"MPI_LOCALNRANKS": "1"}).rendezvous == ""  # several machines


def test_ranks_of_mpi_on_several_machines_need_a_rendezvous(monkeypatch):
    monkeypatch.setattr(startup, "has_mpi4py", lambda: False)
    with pytest.raises(HandgradError, match="nothing says where they meet.*--rendezvous HOST:PORT"):
        startup._open(RanksRequest(), MPICH | {"MPI_LOCALNRANKS": "1"})


def test_slurm_step():
    assert found(STEP) == ("Slurm", 3, 4, 1, 2)
    assert from_environment(STEP).rendezvous == f"n01:{61440 + 9}" and from_environment(STEP).run == "7.2"


def test_batch_script_of_slurm_is_one_process():
    assert from_environment(BATCH) is None and isinstance(startup._open(RanksRequest(), BATCH), Alone)


def test_torchrun_that_srun_started_wins():
    assert found(STEP | TORCHRUN)[0] == "torchrun"


def test_slurm_with_pmi_knows_the_machines():
    """srun --mpi=pmi2 sets PMI_RANK and PMI_SIZE, but not which ranks share a machine."""
    assert found(STEP | {"PMI_RANK": "3", "PMI_SIZE": "4"}) == ("Slurm", 3, 4, 1, 2)
    assert found(STEP | MPICH)[0] == "MPICH"  # mpiexec inside a step


def test_two_mpi_launchers_that_disagree_are_refused():
    assert found(OPEN_MPI | MPICH)[1:3] == (1, 2)
    with pytest.raises(HandgradError, match="MPICH: rank 0 of 3.*unset the other's variables") as error:
        from_environment(OPEN_MPI | MPICH | {"PMI_RANK": "0", "PMI_SIZE": "3"})
    assert "Open MPI: rank 1 of 2" in str(error.value)


@pytest.mark.parametrize(
    ("env", "name"),
    [(TORCHRUN, "RANK"), (TORCHRUN, "LOCAL_RANK"), (MPICH, "PMI_SIZE"), (STEP, "SLURM_STEP_ID")],
)
@pytest.mark.parametrize("value", ["", "two", "-1", "1.0"])
def test_variable_that_is_no_number_is_named(env, name, value):
    with pytest.raises(HandgradError, match=rf"\[ranks\] {name} is a number, but got '{value}'"):
        from_environment(env | {name: value})


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[1-3]", "n1"),
        ("n[003,007-9]", "n003"),
        ("gpu-[7,9]-ib,login", "gpu-7-ib"),
        ("a.b.c,d", "a.b.c"),
        ("localhost", "localhost"),
    ],
)
def test_first_host_of_a_list_of_slurm(nodes, host):
    assert first_host(nodes) == host


# flags -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_launcher(monkeypatch):
    for name in {*TORCHRUN, *OPEN_MPI, *MPICH, *STEP, processes.RANK_VARIABLE}:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(startup, "_opened", [])


@pytest.mark.parametrize(
    ("flags", "rule", "hint"),
    [
        ("--ranks 2 --rank 0", "--rank needs --rendezvous", "--rendezvous HOST:PORT of rank 0"),
        ("--ranks 2 --rank 2 --rendezvous f", "--rank is one of 0 to 1, below --ranks 2, but got 2", ""),
        ("--rank 0 --rendezvous f", "--rank goes with --ranks, how many there are, but got no --ranks", ""),
        ("--rank 1", "--rank goes with --ranks, how many there are, but got no --ranks", ""),
        ("--rendezvous f", "--rendezvous needs several ranks", "hint: --ranks"),
        ("--ranks 1 --rendezvous f", "--rendezvous needs several ranks", "hint: --ranks"),
        ("--ranks 1 --rank 0 --rendezvous f", "--rendezvous needs several ranks", "--ranks"),
        ("--ranks 2 --rendezvous f", "--rendezvous needs --rank, or a launcher", "hint: --rank, from 0"),
        ("--ranks 2 --ranks-per-machine 1", "--ranks-per-machine goes with --rank", "hint: --rank"),
        ("--ranks-per-machine 1", "--ranks-per-machine goes with --rank", "hint: --rank"),
        ("--ranks 2 --rank 0 --rendezvous h:0", "HOST:PORT, with a port of 1 to 65535, or a file, but got 'h:0'", ""),
        ("--ranks 2 --rank 1 --rendezvous h:65536", "HOST:PORT, with a port of 1 to 65535, or a file", ""),
        ("--ranks 2 --rank 1 --rendezvous h:port", "HOST:PORT, with a port of 1 to 65535, or a file", ""),
        ("--ranks 2 --rank 1 --rendezvous :4000", "HOST:PORT, with a port of 1 to 65535, or a file", ""),
        ("--ranks 2 --rank 1 --ranks-per-machine 3 --rendezvous f", "is at most --ranks 2, but got 3", ""),
        ("--ranks 2 --rank 0 --rendezvous no/such/f", "no/such/f must be writable", "No such file"),
        ("--ranks two", "--ranks takes", "two"),
        ("--ranks -1", "ranks", "-1"),
        ("--num-gpus 2 --backend cpu --rank 0", "--rank needs --rendezvous", ""),
    ],
)
def test_flags_that_do_not_fit_together(no_launcher, capsys, monkeypatch, tmp_path, flags, rule, hint):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *flags.split()]) == 2
    told = capsys.readouterr().err
    assert rule in told and hint in told and told.count("\n") == 1, told


@pytest.mark.parametrize(
    ("env", "name"), [(TORCHRUN, "torchrun"), (OPEN_MPI, "Open MPI"), (MPICH, "MPICH"), (STEP, "Slurm")]
)
@pytest.mark.parametrize("flags", ["--ranks 2", "--ranks 1", "--ranks 2 --rank 0 --rendezvous f"])
def test_launcher_and_ranks_of_the_command_line_are_refused(no_launcher, capsys, monkeypatch, env, name, flags):
    for variable, value in env.items():
        monkeypatch.setenv(variable, value)
    assert main(["train", *flags.split()]) == 2
    told = capsys.readouterr().err
    assert f"{name} has started" in told and "leave out --ranks" in told and told.count("\n") == 1, told


def test_launcher_of_one_rank_leaves_ranks_to_the_command_line(monkeypatch):
    """As in a shell that salloc or srun has started."""
    monkeypatch.setattr(startup, "start", lambda ranks, argv: (ranks, argv))
    one = STEP | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "1"}
    assert startup._open(RanksRequest(2, argv=["train"]), one) == (2, ["train"])


@pytest.mark.parametrize("rank", range(5))
def test_ranks_by_hand_divide_into_machines(rank):
    """Five ranks, two on each machine: the last machine has one."""
    info = startup.from_flags(RanksRequest(5, rank, 2, "h:1"))
    assert (info.local_rank, info.local_world) == (rank % 2, 1 if rank == 4 else 2)


# rendezvous ------------------------------------------------------------------------------------------------------------


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def in_threads(calls):
    """What the calls return, or raise, each in a thread of its own; and the seconds until all have ended."""
    results, begin = [None] * len(calls), time.monotonic()

    def run(i):
        try:
            results[i] = calls[i]()
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    return results, time.monotonic() - begin


def arrival(rank, ranks, where, run="", seconds=5.0, delay=0.0, first_exit=lambda: ""):
    """A call in which a rank meets the others; it returns what they agree on."""

    def call():
        time.sleep(delay)
        listener = rendezvous.listen(rank, where)
        try:
            peers, token = rendezvous.meet(rank, ranks, where, run, listener, time.monotonic() + seconds, first_exit)
            return [peer.port for peer in peers], token, listener.port
        finally:
            listener.close()

    return call


@pytest.fixture(params=["port", "file"])
def where(request, tmp_path):
    return f"127.0.0.1:{free_port()}" if request.param == "port" else str(tmp_path / "meet")


def assert_met(results):
    assert not any(isinstance(result, Exception) for result in results), results
    ports, token, _ = results[0]
    assert all(result[:2] == (ports, token) for result in results)
    assert ports == [result[2] for result in results] and len(token) == 16


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("last", [0, 1])
def test_ranks_meet_in_any_order(where, ranks, last, tmp_path):
    results, _ = in_threads([arrival(r, ranks, where, delay=0.2 * (r == last)) for r in range(ranks)])
    assert_met(results)
    assert not list(tmp_path.iterdir())  # the file is gone


@contextmanager
def service(answer=None):
    """A port of another program: it says something at once, or never answers."""
    server, kept = socket.create_server(("127.0.0.1", 0)), []

    def serve():
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            kept.append(connection)
            if answer is not None:
                connection.sendall(answer)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield server.getsockname()[1]
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join()
        for connection in kept:
            connection.close()


def framed(value):
    raw = json.dumps(value).encode()
    return struct.pack("<I", len(raw)) + raw


ANSWERS = {
    "silent": None,
    "text": b"SSH-2.0-OpenSSH_9.6\r\n",
    "short": b"\x01",
    "huge": b"\xff" * 8,
    "number": framed(7),
    "object": framed({"a": 1}),
    "no utf-8": struct.pack("<I", 2) + b"\xff\xfe",
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_file_of_an_earlier_run_is_passed_over(tmp_path, answer, monkeypatch):
    """Its port is another program's by now."""
    monkeypatch.setattr(mesh, "ATTEMPT_SECONDS", 0.5)
    file = tmp_path / "meet"
    with service(ANSWERS[answer]) as port:
        file.write_text(json.dumps({"hosts": ["127.0.0.1"], "port": port}))
        results, seconds = in_threads([arrival(r, 3, str(file), delay=0.3 * (r == 0)) for r in range(3)])
    assert_met(results)
    assert seconds < 4


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"hosts": 1, "port": 2}', "\0", None])
def test_damaged_file_is_passed_over(tmp_path, text):
    file = tmp_path / "meet"
    file.write_text(json.dumps({"hosts": ["127.0.0.1"], "port": free_port()}) if text is None else text)
    results, _ = in_threads([arrival(r, 2, str(file), delay=0.2 * (r == 0)) for r in range(2)])
    assert_met(results)


def test_programs_that_are_no_ranks_do_not_disturb(where):
    """They connect to rank 0 and say something else, or nothing."""
    stop = threading.Event()

    def knock():
        while not stop.is_set():
            for host, port in rendezvous._addresses(where):
                try:
                    with socket.create_connection((host, port), 1) as connection:
                        connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
                except OSError:
                    pass
            time.sleep(0.01)

    thread = threading.Thread(target=knock)
    thread.start()
    results, _ = in_threads([arrival(r, 2, where, delay=0.3 * r) for r in range(2)])
    stop.set()
    thread.join()
    assert_met(results)


def test_rank_of_another_run_is_turned_away(where):
    """The run's own ranks meet all the same."""
    calls = [arrival(0, 2, where, "a"), arrival(1, 2, where, "b", 0.7), arrival(1, 2, where, "a", delay=0.4)]
    (first, other, second), _ = in_threads(calls)
    assert_met([first, second])
    assert isinstance(other, HandgradError) and "hint: is rank 0 running" in str(other)
    assert "but got rank 0 of another run" in str(other)


def refused(results, rule):
    for result in results:
        assert isinstance(result, HandgradError) and re.search(rule, str(result)), results


def test_two_ranks_with_one_number_are_refused_on_all_sides(where):
    results, _ = in_threads([arrival(0, 3, where), arrival(1, 3, where), arrival(1, 3, where, delay=0.3)])
    refused(results, "every rank has a number of its own below 3, but two have 1")


def test_rank_that_left_may_come_again(where):
    """Rank 1 is started with a wrong flag, ended, and started again, while rank 0 waits."""
    calls = [arrival(0, 3, where), arrival(1, 3, where, delay=0.6), arrival(2, 3, where, delay=0.8)]

    def leave():
        time.sleep(0.3)
        (host, port), *_ = rendezvous._addresses(where)
        hello = {"run": "", "rank": 1, "world": 3, "version": rendezvous.own_version(), "port": 1, "hosts": []}
        with socket.create_connection((host, port)) as connection:
            mesh.send(connection, hello)

    results, _ = in_threads([*calls, leave])
    assert_met(results[:3])


def test_another_number_of_ranks_is_refused_on_all_sides(where):
    results, _ = in_threads([arrival(0, 3, where), arrival(1, 3, where), arrival(2, 4, where, delay=0.3)])
    refused(results, "rank 0 is one of 3 ranks, and rank 2 one of 4")


def other_version(monkeypatch):
    """Every rank but 0 says that it runs another version."""
    mine = threading.local()
    real = rendezvous.meet

    def meet(rank, *rest):
        mine.rank = rank
        return real(rank, *rest)

    monkeypatch.setattr(rendezvous, "meet", meet)
    monkeypatch.setattr(rendezvous, "own_version", lambda: "1" if mine.rank == 0 else "2")


def test_another_version_is_refused_on_all_sides(where, monkeypatch):
    other_version(monkeypatch)
    results, _ = in_threads([arrival(0, 2, where), arrival(1, 2, where)])
    refused(results, "all ranks run handgrad 1, but rank 1 runs 2")


def test_a_rendezvous_without_checks_is_caught(where, monkeypatch):
    """Mutation: without `_mistake`, ranks of two versions meet."""
    other_version(monkeypatch)
    monkeypatch.setattr(rendezvous, "_mistake", lambda *_: "")
    assert_met(in_threads([arrival(0, 2, where), arrival(1, 2, where)])[0])


@pytest.mark.parametrize("missing", [1, 2])
def test_rank_that_never_comes_is_named_by_all_others(where, missing, monkeypatch, tmp_path):
    monkeypatch.setattr(rendezvous, "MEET_SECONDS", 0.5)
    results, seconds = in_threads([arrival(r, 3, where, seconds=0.5) for r in range(3) if r != missing])
    refused(results, f"within 0 s, but these have not: {missing}")
    assert seconds < 2.5 and not list(tmp_path.iterdir())


def test_rank_0_that_never_comes_is_told(where, monkeypatch):
    monkeypatch.setattr(rendezvous, "MEET_SECONDS", 0.5)
    results, seconds = in_threads([arrival(r, 3, where, seconds=0.5) for r in (1, 2)])
    refused(results, f"rank 0 (answers at|writes) .*{re.escape(where)}.* but got no answer.*is rank 0 running")
    assert seconds < 2


def notes(monkeypatch, capsys, calls):
    """The lines that ranks print which wait for a moment; all of them meet."""
    monkeypatch.setattr(rendezvous, "NOTE_SECONDS", 0.3)
    results, _ = in_threads(calls)
    assert_met(results)
    return sorted(capsys.readouterr().err.splitlines())


def test_rank_0_says_once_how_many_it_waits_for(where, monkeypatch, capsys):
    calls = [arrival(r, 3, where, delay=1.2 * (r == 2)) for r in range(3)]
    (line,) = notes(monkeypatch, capsys, calls)
    assert re.fullmatch(rf"rank 0 waits at .*{re.escape(where)}'? for 1 of 3 ranks, for at most [45] s more", line)


def test_ranks_say_once_that_they_wait_for_rank_0(where, monkeypatch, capsys):
    lines = notes(monkeypatch, capsys, [arrival(r, 3, where, delay=1.2 * (r == 0)) for r in range(3)])
    assert len(lines) == 2
    for rank, line in enumerate(lines, 1):
        rule = rf"rank {rank} waits for rank 0 at .*{re.escape(where)}'?, for at most [45] s more"
        assert re.fullmatch(rule, line)


def test_ranks_that_meet_at_once_say_nothing(where, monkeypatch, capsys):
    assert notes(monkeypatch, capsys, [arrival(r, 2, where) for r in range(2)]) == []


def test_process_that_has_ended_is_not_waited_for(where):
    calls = [arrival(0, 3, where, first_exit=lambda: "rank 2: its process has ended"), arrival(1, 3, where)]
    results, seconds = in_threads(calls)
    refused(results, "rank 2: its process has ended")
    assert seconds < 2


def test_rank_0_that_has_ended_is_not_waited_for(where):
    results, seconds = in_threads([arrival(1, 2, where, first_exit=lambda: "rank 0: its process has ended")])
    refused(results, "rank 0: its process has ended")
    assert seconds < 1


def test_port_that_is_taken_is_one_line(no_launcher, capsys):
    with service() as port:
        assert main(f"train --ranks 2 --rank 0 --rendezvous 127.0.0.1:{port}".split()) == 2
        told = capsys.readouterr().err
    assert f"rank 0 cannot listen at port {port}: Address already in use" in told and told.count("\n") == 1


# connections -----------------------------------------------------------------------------------------------------------


def connected(ranks, **changes):
    """The sockets of all ranks, by (rank, channel)."""
    listeners = [Listener("127.0.0.1") for _ in range(ranks)]
    peers = [mesh.Peer(["127.0.0.1"], listener.port) for listener in listeners]
    end = time.monotonic() + changes.pop("seconds", 5.0)

    def call(rank):
        run = changes.get("runs", ["a"] * ranks)[rank]
        return lambda: mesh.connect(rank, peers, run, listeners[rank], CHANNELS, end)

    results, _ = in_threads([call(r) for r in changes.get("who", range(ranks))])
    for listener in listeners:
        listener.close()
    return results


@contextmanager
def linked(ranks, **options):
    links = connected(ranks)
    try:
        yield links
    finally:
        for link in (link for own in links for link in own.values()):
            link.close()


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_two_ranks_are_connected_on_every_channel(ranks):
    with linked(ranks) as links:
        for rank, own in enumerate(links):
            assert own.keys() == {(r, channel) for r in range(ranks) if r != rank for channel in CHANNELS}
            for (other, channel), link in own.items():
                assert link.getsockname() == links[other][rank, channel].getpeername()


def test_rank_of_another_run_is_not_connected(monkeypatch):
    monkeypatch.setattr(mesh, "ATTEMPT_SECONDS", 0.2)
    first, second = connected(2, runs=["a", "b"], seconds=0.5)
    assert "rank 1 did not connect to rank 0" in str(first) and "rank 0 does not answer at any of 127.0.0.1:" in str(
        second
    )


def test_rank_that_does_not_connect_is_named(monkeypatch):
    monkeypatch.setattr(mesh, "ATTEMPT_SECONDS", 0.2)
    first, third = connected(3, who=[0, 2], seconds=0.5)
    assert "rank 1 did not connect to rank 0" in str(first) and "rank 1 does not answer at any of" in str(third)


def test_addresses_of_this_machine_end_with_loopback():
    assert addresses()[-1].startswith("127.") and all(socket.inet_aton(a) for a in addresses())


@pytest.mark.parametrize("size", [0, 1, 1000, 3_000_000])
def test_arrays_arrive_whole(size):
    """Larger ones than a socket holds, too."""
    values = np.random.default_rng(0).integers(0, 255, (3, size), np.uint8)
    with linked(3) as links:
        comms = [Sockets(r, 3, links[r], None, 10.0) for r in range(3)]

        def all_to_all(rank):
            got = [np.zeros(size, np.uint8) for _ in range(3)]
            comms[rank].all_to_all([values[rank]] * 3, got)
            return [g for r, g in enumerate(got) if r != rank]

        results, _ = in_threads([lambda r=r: all_to_all(r) for r in range(3)])
    for rank in range(3):
        assert all(np.array_equal(g, values[r]) for g, r in zip(results[rank], [r for r in range(3) if r != rank]))


def test_rank_that_does_not_answer_the_last_exchange_is_an_error():
    with linked(2) as links:
        begin = time.monotonic()
        with pytest.raises(HandgradError, match="a rank has not answered for"):
            Sockets(0, 2, links[0], None, 0.3).all_gather_bytes(b"x")
        assert time.monotonic() - begin < 2


# the watch -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(watch, "HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setattr(watch, "TIMEOUT_SECONDS", 0.5)


def links_of(links, channel="watch"):
    return [{r: link for (r, c), link in own.items() if c == channel} for own in links]


def wait(condition, seconds=3.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_ranks_that_live_are_no_failure(fast):
    with linked(3) as links:
        watches = [Watch(r, own) for r, own in enumerate(links_of(links))]
        time.sleep(0.8)
        assert all(w.failure is None and w.is_alive() for w in watches)
        for w in watches:
            w.close()
        for w in watches:
            w.join(3)
            assert not w.is_alive() and w.failure is None


def test_rank_that_ends_is_noticed_at_once():
    with linked(3) as links:
        own = links_of(links)
        watches = [Watch(r, own[r], lambda rank: f"reason of {rank}") for r in (0, 1)]
        begin = time.monotonic()
        for link in own[2].values():
            link.shutdown(socket.SHUT_RDWR)
        wait(lambda: all(w.failure for w in watches))
        assert time.monotonic() - begin < 0.9  # less than a heartbeat
        for w in watches:
            assert w.failure.rank == 2 and w.failure.is_gone and "[rank 2] reason of 2." in str(w.failure)
            with pytest.raises(RankError):
                w.check()


def test_a_watch_that_does_not_read_the_end_is_caught(monkeypatch):
    """Mutation: bytes that end count as a heartbeat."""
    monkeypatch.setattr(Watch, "_read", lambda self, rank, now: self._heard.update({rank: now}))
    with linked(2) as links:
        own = links_of(links)
        w = Watch(0, own[0])
        own[1][0].shutdown(socket.SHUT_RDWR)
        time.sleep(0.5)
        assert w.failure is None


def test_rank_that_is_silent_is_noticed(fast):
    with linked(2) as links:
        own = links_of(links)
        w = Watch(0, own[0])  # rank 1 has none: it sends no heartbeats
        begin = time.monotonic()
        wait(lambda: w.failure)
        assert 0.45 < time.monotonic() - begin < 1.5
        assert w.failure.rank == 1 and w.failure.is_gone and "it has not answered for" in str(w.failure)


def failure_after_a_stop(monkeypatch):
    """What a watch knows after its clock has jumped, as after SIGSTOP and SIGCONT of all ranks: no heartbeats wait."""
    offset, real = [0.0], time.monotonic
    monkeypatch.setattr(watch.time, "monotonic", lambda: real() + offset[0])
    with linked(2) as links:
        own = links_of(links)
        w = Watch(0, own[0])
        time.sleep(0.1)
        offset[0] += 100.0
        time.sleep(0.15)
        for _ in range(10):
            own[1][0].send(b"\n")
            time.sleep(0.04)
        own[1][0].send(b"bye\n")
        w.join(3)
        return w.failure


def test_a_watch_that_was_stopped_itself_does_not_blame_others(fast, monkeypatch):
    assert failure_after_a_stop(monkeypatch) is None


def test_a_watch_that_counts_its_own_stop_is_caught(fast, monkeypatch):
    """Mutation: `run` never sees that its own clock has jumped."""
    code = Watch.run.__code__
    longer = code.replace(co_consts=tuple(10**6 if c == 5 else c for c in code.co_consts))
    assert longer.co_consts != code.co_consts
    monkeypatch.setattr(Watch, "run", type(Watch.run)(longer, Watch.run.__globals__))
    assert "it has not answered" in str(failure_after_a_stop(monkeypatch))


def test_error_of_a_rank_reaches_all_others_once(fast):
    text = "[data] a “file” is whole, but got half.\nand more"
    with linked(3) as links:
        watches = [Watch(r, own) for r, own in enumerate(links_of(links))]
        watches[1].fail(text, 2)
        watches[1].fail("another", 1)
        wait(lambda: watches[0].failure and watches[2].failure)
        for w in (watches[0], watches[2]):
            assert (w.failure.rank, w.failure.code, w.failure.is_gone) == (1, 2, False)
            assert "a “file” is whole" in str(w.failure)
        for w in watches:
            w.close()


def test_first_failure_stays(fast):
    with linked(3) as links:
        watches = [Watch(r, own) for r, own in enumerate(links_of(links))]
        watches[2].fail("first", 2)
        wait(lambda: watches[0].failure)
        watches[1].fail("second", 2)
        time.sleep(0.2)
        assert watches[0].failure.rank == 2
        for w in watches:
            w.close()


def test_error_that_arrives_in_pieces_is_read_whole(fast):
    line = json.dumps(["é" * 3, 2]).encode() + b"\n"
    with linked(2) as links:
        own = links_of(links)
        w = Watch(0, own[0])
        for at in range(len(line)):
            own[1][0].send(line[at : at + 1])
            time.sleep(0.01)
        wait(lambda: w.failure)
        assert "ééé" in str(w.failure)


def test_rank_that_waits_for_data_of_a_failed_one_raises_its_error():
    with linked(2) as links:
        comms = [Sockets(r, 2, links[r], Watch(r, own)) for r, own in enumerate(links_of(links))]

        def fail():
            time.sleep(0.2)
            comms[1].fail("a bug", 1)

        begin = time.monotonic()
        (error, _), _ = in_threads([lambda: comms[0].total(1.0), fail])
        assert isinstance(error, RankError) and error.code == 1 and "[rank 1] a bug." in str(error)
        assert time.monotonic() - begin < 2
        last = [comm.after_failure() for comm in comms]  # both can still say how far they are
        results, _ = in_threads([lambda c=c: c.all_gather_object(c.rank) for c in last])
        assert results == [[0, 1], [0, 1]]
        for comm in comms:
            comm.close()


def test_self_started_ranks_meet_and_leave(monkeypatch, capsys):
    """`start` with the ranks as threads: what it gives to the other processes suffices for them."""
    monkeypatch.setattr(startup.atexit, "register", lambda *_: None)
    monkeypatch.setattr(startup.sys, "excepthook", startup.sys.excepthook)
    results = {}

    class Process:
        def __init__(self, command, env, stdin):
            assert command[1:4] == ["-P", "-m", "handgrad.cli"] and command[4:] == ["train", "--ranks", "3"]
            rank = int(env[processes.RANK_VARIABLE].split()[0])
            monkeypatch.setattr(startup.os, "getppid", startup.os.getpid)

            def run():
                comm = startup._open(RanksRequest(), env)
                results[rank] = comm.all_gather_object(comm.rank)
                comm.close()

            self.thread = threading.Thread(target=run)
            self.thread.start()

        def wait(self, timeout):
            raise processes.subprocess.TimeoutExpired("", timeout)

    monkeypatch.setattr(processes.subprocess, "Popen", Process)
    monkeypatch.setattr(startup.limits, "cores", lambda: 2)
    comm = startup.start(3, ["train", "--ranks", "3"])
    assert capsys.readouterr().err == "note: 3 ranks share 2 cores, and each gets one thread\n"
    assert comm.all_gather_object(comm.rank) == [0, 1, 2] and (comm.local_world, comm.local_rank) == (3, 0)
    comm.close()
    wait(lambda: len(results) == 2)
    assert set(map(tuple, results.values())) == {(0, 1, 2)}


@pytest.mark.skipif(not why_no_cuda(), reason="there is a GPU")
@pytest.mark.parametrize("flag", ["--gpus", "--num-gpus", "--num_gpus"])
def test_gpus_without_a_gpu_are_no_ranks_on_the_cpu(no_launcher, capsys, flag):
    assert main(["train", flag, "2"]) == 2
    told = capsys.readouterr().err
    assert "--gpus trains on GPUs: " in told and told.count("hint:") == 1 and "--ranks 2 --backend cpu" in told


def test_an_empty_rendezvous_is_none():
    assert requested_ranks("train", ["--rendezvous", "", "--ranks=2"]).rendezvous == ""
