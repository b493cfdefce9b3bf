"""The tools of agent.yaml, as verl wants them."""

from verl.tools.function_tool import function_tool

from entropy_polarity.tasks.tools import calculator

function_tool(calculator)
