-- What wrk sends, and the outcome as one line of JSON. Arguments: how many of ten requests are
-- votes, and how many milliseconds a connection rests between two, on average.

local form = {["Content-Type"] = "application/x-www-form-urlencoded"}

function init(arguments)
   local votes, rest = tonumber(arguments[1]), tonumber(arguments[2])
   local page = wrk.format("GET")
   for name, value in pairs(wrk.headers) do form[name] = value end
   local vote = wrk.format("POST", "/add", form, "vote=Pita")
   local sent = 0
   math.randomseed(os.time())
   request = function()
      sent = sent + 1
      return sent % 10 < votes and vote or page
   end
   -- Visitors come independently of each other: the time to the next is distributed exponentially.
   if rest > 0 then
      delay = function() return -rest * math.log(1 - math.random()) end
   end
end

function done(summary, latency)
   local errors = summary.errors
   print(string.format('\n{"seconds": %f, "requests": %d, "failed": %d, "p50": %f, "p99": %f}',
      summary.duration / 1e6, summary.requests,
      errors.connect + errors.read + errors.write + errors.status + errors.timeout,
      latency:percentile(50) / 1000, latency:percentile(99) / 1000))
end
