import shutil

import pytest


@pytest.fixture(scope="session")
def _driver():
    import browser

    driver, profile = browser.start()
    yield driver
    driver.quit()
    shutil.rmtree(profile, ignore_errors=True)


@pytest.fixture
def screen(_driver, tmp_path):
    import browser

    folder = tmp_path / "pages"
    folder.mkdir()
    return browser.Screen(_driver, folder)


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A run of 80 steps with a gate that climbs and falls; not to be written to."""
    import recorded

    folder = tmp_path_factory.mktemp("run")
    recorded.record(folder)
    return folder
