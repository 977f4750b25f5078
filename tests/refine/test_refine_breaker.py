import pytest

from guardrails import ConfigurationError
from guardrails.refine.breaker import CircuitBreaker


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def fail(breaker, times):
    for _ in range(times):
        breaker.failed()
    return breaker.state


def test_it_opens_after_failures_in_a_row_and_not_before(clock):
    breaker = CircuitBreaker(3, 10.0, clock=clock)
    assert fail(breaker, 2) == "closed"
    breaker.succeeded()
    assert fail(breaker, 2) == "closed"
    assert fail(breaker, 1) == "open"


def test_it_stays_open_for_the_cooldown_and_no_longer(clock):
    breaker = CircuitBreaker(1, 10.0, clock=clock)
    fail(breaker, 1)
    clock.now += 9.999
    assert breaker.state == "open"
    clock.now += 0.001
    assert breaker.state == "half-open"


def test_a_probe_that_succeeds_closes_it_and_forgets_all(clock):
    breaker = CircuitBreaker(2, 10.0, clock=clock)
    fail(breaker, 2)
    clock.now += 10.0
    fail(breaker, 1)
    clock.now += 20.0
    breaker.succeeded()
    assert breaker.state == "closed"
    assert fail(breaker, 1) == "closed"
    assert fail(breaker, 1) == "open"
    clock.now += 10.0
    assert breaker.state == "half-open"


def test_a_probe_that_fails_opens_it_for_twice_as_long_up_to_a_bound(clock):
    breaker = CircuitBreaker(1, 10.0, longest=30.0, clock=clock)
    fail(breaker, 1)
    for seconds in (10.0, 20.0, 30.0, 30.0):
        clock.now += seconds - 0.001
        assert breaker.state == "open"
        clock.now += 0.001
        assert breaker.state == "half-open"
        breaker.failed()
        assert breaker.state == "open"


def test_answers_on_their_way_when_it_opens_do_not_prolong_it(clock):
    breaker = CircuitBreaker(1, 10.0, clock=clock)
    fail(breaker, 1)
    clock.now += 5.0
    fail(breaker, 3)
    clock.now += 5.0
    assert breaker.state == "half-open"


@pytest.mark.parametrize("arguments", [{"failures": 0}, {"cooldown": 0.0}, {"cooldown": 10.0, "longest": 5.0}])
def test_values_out_of_range_are_refused(arguments):
    with pytest.raises(ConfigurationError):
        CircuitBreaker(**arguments)
