"""What the store does inside Redis when messages in SQS say what may be claimed: see
redis_scripts.py for the keys.

A job that waits is in P:queue:LANE while it needs a message, and in P:sent when it has one, with
the time at which that is given up. Whoever receives a message asks here what it is worth.
"""

from nanogpt.jobs.redis_scripts import COMMON

# ARGV: seconds after which the message is given up, then ids. Twice as long after each message that
# brought nobody: a job may just wait long.
SENT = (
    COMMON
    + """
for i = 3, #ARGV do
    local id = ARGV[i]
    local lane = field(id, 'lane')
    if lane and redis.call('ZREM', P .. ':queue:' .. lane, id) == 1 then
        local sends = math.min(redis.call('HINCRBY', job(id), 'sends', 1), 10)
        redis.call('ZADD', P .. ':sent', now + tonumber(ARGV[2]) * 2 ^ (sends - 1), id)
    end
end
"""
)

# ARGV: id. Returns 1 when nobody can have seen the job, and it is gone.
WITHDRAW = (
    COMMON
    + """
local id = ARGV[2]
if redis.call('ZSCORE', P .. ':queue:' .. (field(id, 'lane') or ''), id) and not field(id, 'fence')
then return forget(id) end
return 0
"""
)

# ARGV: id, lease in seconds. Returns the job's fields; seconds, as a string, that another holds
# it; or 0 when nothing is left to do.
TAKE = (
    COMMON
    + """
local id = ARGV[2]
local status = field(id, 'status')
if status ~= 'queued' and status ~= 'in_progress' then return 0 end
local held = tonumber(redis.call('ZSCORE', P .. ':leases', id) or now)
if held > now then return tostring(held - now) end
redis.call('HDEL', job(id), 'sends')
return take(id, tonumber(ARGV[3]))
"""
)

# ARGV: how many of each lane. Returns ids and lanes of jobs that need a message now, because a
# lease has run out or a message is given up, and then of all that need one.
UNSENT = (
    COMMON
    + """
local function with_lanes(ids)
    local found = {}
    for _, id in ipairs(ids) do
        found[#found + 1] = id
        found[#found + 1] = field(id, 'lane')
    end
    return found
end
local now_due = queue_expired()
for _, id in ipairs(redis.call('ZRANGEBYSCORE', P .. ':sent', '-inf', now, 'LIMIT', 0, 1000)) do
    queue(id)
    now_due[#now_due + 1] = id
end
local all = {}
for lane = 0, 2 do
    for _, id in ipairs(redis.call('ZRANGE', P .. ':queue:' .. lane, 0, tonumber(ARGV[2]) - 1)) do
        all[#all + 1] = id
    end
end
return {with_lanes(now_due), with_lanes(all)}
"""
)
