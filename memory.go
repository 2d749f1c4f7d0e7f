package main

import (
	"context"
	"sync"
	"sync/atomic"
	"time"
)

// sweepEvery is how often the records that have ended are forgotten.
const sweepEvery = 2 * time.Second

// localRecords are the records of at most max tickets, finished ones too, in a map.
type localRecords struct {
	max   int64
	count atomic.Int64 // of records
	byKey sync.Map     // *record
}

func (m *localRecords) ready() error {
	if m.count.Load() >= m.max {
		return errTooManyTickets
	}
	return nil
}

func (m *localRecords) add(_ context.Context, k key, r *record) (bool, error) {
	if m.count.Add(1) > m.max {
		m.count.Add(-1)
		return false, errTooManyTickets
	}
	_, known := m.byKey.LoadOrStore(k, r)
	if known {
		m.count.Add(-1)
	}
	return !known, nil
}

func (m *localRecords) get(_ context.Context, k key) (*record, error) {
	v, _ := m.byKey.Load(k)
	r, _ := v.(*record)
	return r, nil
}

func (m *localRecords) swap(_ context.Context, k key, old, next *record) (bool, error) {
	return m.byKey.CompareAndSwap(k, old, next), nil
}

// sweep forgets the records that have ended, every sweepEvery until ctx ends, and
// tells onStatus of those with which nobody has logged in. Among very many records it
// sweeps less often: a twentieth of a core is enough.
func (m *localRecords) sweep(ctx context.Context, onStatus func(key, record)) {
	for every := sweepEvery; ctx.Err() == nil; pause(ctx, every) {
		start := time.Now()
		for k, v := range m.byKey.Range {
			r := v.(*record)
			if r.Ends.After(start) || !m.byKey.CompareAndDelete(k, r) {
				continue
			}
			m.count.Add(-1)
			if r.waits() {
				onStatus(k.(key), r.become(statusExpired, 0))
			}
		}
		every = max(sweepEvery, 20*time.Since(start))
	}
}

// pause returns after d, or when ctx ends.
func pause(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}
