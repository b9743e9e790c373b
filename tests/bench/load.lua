-- What wrk sends, and the outcome as one line of JSON. Arguments: how many milliseconds a connection rests between two
-- requests, on average; whether somebody votes each second beside, so that nobody can keep a page for ever (1 or 0);
-- and the requests, which all connections together send in turn:
--    GET PATH    a page or a file
--    POST PATH   a vote
--    POLL PATH   a page as a visitor asks for it who has it: with the tag of the last 200 of its kind

local form = {["Content-Type"] = "application/x-www-form-urlencoded"}
local kinds = {["/"] = "text/html", ["/tally.json"] = "application/json"}
local polled, poll  -- the path, and the request for it; one path at most
local thread
unchanged = 0

function setup(the_only_one)
   thread = the_only_one
end

local function follow(status, headers)
   if status == 304 then unchanged = unchanged + 1 end
   if status ~= 200 then return end
   local lower = {}  -- as some servers write their names
   for name, value in pairs(headers) do lower[name:lower()] = value end
   if lower["etag"] and lower["content-type"]:find(kinds[polled], 1, true) then
      poll = wrk.format("GET", polled, {["If-None-Match"] = lower["etag"]})
   end
end

function init(arguments)
   local rest, somebody_votes = tonumber(arguments[1]), arguments[2] == "1"
   local vote = wrk.format("POST", "/add", form, "vote=Pita")
   local plan, last, second = {}, 0, os.time()
   for number = 3, #arguments do
      local method, path = arguments[number]:match("(%S+) (%S+)")
      if method == "POLL" then
         polled, poll, response = path, wrk.format("GET", path), follow
      end
      table.insert(plan, method == "GET" and wrk.format("GET", path) or method == "POST" and vote or "POLL")
   end
   request = function()
      if somebody_votes and os.time() > second then
         second = os.time()
         return vote
      end
      last = last % #plan + 1
      return plan[last] == "POLL" and poll or plan[last]
   end
   -- Visitors come independently of each other: the time to the next is distributed exponentially.
   if rest > 0 then
      math.randomseed(os.time())
      delay = function() return -rest * math.log(1 - math.random()) end
   end
end

function done(summary, latency)
   local errors = summary.errors
   print(string.format('\n{"seconds": %f, "requests": %d, "failed": %d, "unchanged": %d, "p50": %f, "p99": %f}',
      summary.duration / 1e6, summary.requests,
      errors.connect + errors.read + errors.write + errors.status + errors.timeout, thread:get("unchanged"),
      latency:percentile(50) / 1000, latency:percentile(99) / 1000))
end
