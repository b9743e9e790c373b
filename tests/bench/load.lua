-- What wrk sends, and the outcome as one line of JSON. Arguments: the requests, which all connections together send in
-- turn. Beside them somebody votes each second, so that nobody can keep a page for ever.
--    GET PATH          a page or a file
--    POST /add         a vote
--    POLL /tally.json  the tally, as a visitor asks for it who has it: with the tag of the last answer 200

local poll  -- the request for it
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
   if lower["etag"] and lower["content-type"]:find("application/json", 1, true) then
      poll = wrk.format("GET", "/tally.json", {["If-None-Match"] = lower["etag"]})
   end
end

function init(arguments)
   local vote = wrk.format("POST", "/add", {["Content-Type"] = "application/x-www-form-urlencoded"}, "vote=Pita")
   local plan, last, second = {}, 0, os.time()
   for _, argument in ipairs(arguments) do
      local method, path = argument:match("(%S+) (%S+)")
      if method == "POLL" then
         poll, response = wrk.format("GET", path), follow
      end
      table.insert(plan, method == "GET" and wrk.format("GET", path) or method == "POST" and vote or "POLL")
   end
   request = function()
      if os.time() > second then
         second = os.time()
         return vote
      end
      last = last % #plan + 1
      return plan[last] == "POLL" and poll or plan[last]
   end
end

function done(summary)
   local errors = summary.errors
   print(string.format('\n{"seconds": %f, "requests": %d, "failed": %d, "unchanged": %d}',
      summary.duration / 1e6, summary.requests,
      errors.connect + errors.read + errors.write + errors.status + errors.timeout, thread:get("unchanged")))
end
