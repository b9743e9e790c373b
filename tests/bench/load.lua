-- What wrk sends, and the outcome as one line of JSON. Arguments: how many milliseconds a connection
-- rests between two requests, on average, and the requests, which all connections together send in turn:
--    GET PATH    a page or a file
--    POST PATH   a vote
--    POLL PATH   a page as a visitor asks for it who has it: with the tag of the last 200 of its kind

local form = {["Content-Type"] = "application/x-www-form-urlencoded"}
local kinds = {["/tally.json"] = "application/json"}  -- what is polled; a page if it is not here
local polled_path, polled_kind  -- one such path among the requests at most
local poll = nil
local threads = {}
unchanged = 0

local function follow(status, headers)
   if status == 304 then unchanged = unchanged + 1 end
   if status ~= 200 then return end
   local tag, kind = nil, ""
   for name, value in pairs(headers) do  -- some servers write names in small letters
      name = name:lower()
      if name == "etag" then tag = value end
      if name == "content-type" then kind = value end
   end
   if tag and kind:find(polled_kind, 1, true) then
      poll = wrk.format("GET", polled_path, {["If-None-Match"] = tag})
   end
end

function setup(thread)
   table.insert(threads, thread)
end

function init(arguments)
   local rest = tonumber(arguments[1])
   local plan, last = {}, 0
   for number = 2, #arguments do
      local method, path = arguments[number]:match("(%S+) (%S+)")
      if method == "POLL" then
         polled_path, polled_kind = path, kinds[path] or "text/html"
         poll = wrk.format("GET", path)
         response = follow
         table.insert(plan, function() return poll end)
      else
         local bytes = method == "GET" and wrk.format("GET", path) or wrk.format("POST", path, form, "vote=Pita")
         table.insert(plan, function() return bytes end)
      end
   end
   request = function()
      last = last % #plan + 1
      return plan[last]()
   end
   -- Visitors come independently of each other: the time to the next is distributed exponentially.
   if rest > 0 then
      math.randomseed(os.time())
      delay = function() return -rest * math.log(1 - math.random()) end
   end
end

function done(summary, latency)
   local errors = summary.errors
   local all_unchanged = 0
   for _, thread in ipairs(threads) do all_unchanged = all_unchanged + thread:get("unchanged") end
   print(string.format('\n{"seconds": %f, "requests": %d, "failed": %d, "unchanged": %d, "p50": %f, "p99": %f}',
      summary.duration / 1e6, summary.requests,
      errors.connect + errors.read + errors.write + errors.status + errors.timeout, all_unchanged,
      latency:percentile(50) / 1000, latency:percentile(99) / 1000))
end
